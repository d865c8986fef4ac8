"""Names of one's own: `package.module:Name` in the settings, from outside the package.

A proposer, tuner, loss, advantage, task or reward need not stand in this package; see
docs/extending.md.
"""

import difflib
import importlib
from typing import Any


def is_external(name: str) -> bool:
    """Tell whether a name says where it is imported from."""
    return ":" in name


def load(what: str, name: str) -> Any:
    """Import what `name`, `package.module:Name`, says: a function or class.

    Its kind is for people to read: `tuner`, `reward function`, ...

    Raises:
      ValueError: the form is another one, module or name is missing, importing fails,
        or it cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{what} {name!r}: accepted is 'package.module:name'.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # A user's module may raise anything.
        why = f"importing {module_name!r} fails"
        if not isinstance(error, ModuleNotFoundError):
            why += f" with {type(error).__name__}: {error}"
        elif error.name and f"{module_name}.".startswith(f"{error.name}."):
            why = (
                f"there is no module {error.name!r}. Start the command where its file "
                "lies, install it, or put its directory on PYTHONPATH."
            )
        else:
            why += f", it needs the module {error.name!r}."
        raise ValueError(f"{what} {name!r}: {why}") from error
    if not hasattr(module, attribute):
        public = [n for n in dir(module) if callable(getattr(module, n))]
        near = difflib.get_close_matches(attribute, public, 1)
        raise ValueError(
            f"{what} {name!r}: module {module_name!r} has no {attribute!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(
            f"{what} {name!r} is of type {type(found).__name__}, which cannot be "
            "called: name a function or a class."
        )
    return found
