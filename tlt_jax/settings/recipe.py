"""Recipes: Python files with `get_config()`, or a run's settings as YAML or JSON."""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from tlt_jax.settings import schema, text

_FILES = (".yaml", ".yml", ".json")
# The free keys of the one belong to the value of the other.
_OWNED = {"task.options": "task.name"}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a recipe says of itself.

    Attributes:
      line: the first of its docstring.
      programs: modules that its docstring starts with it.
      variants: what may stand behind the colon.
    """

    path: pathlib.Path
    line: str
    programs: tuple[str, ...]
    variants: tuple[str, ...]


def load(spec: str, section: type) -> ml_collections.ConfigDict:
    """Read `FILE`, `FILE.py:ARGUMENT` or `package.module:ARGUMENT`.

    The argument is that of `get_config`. Keys and types of a YAML or JSON file are
    those of `section`.

    Raises:
      schema.ConfigError: there is no such file, or what it says cannot be used.
      Exception: a mistake of a Python recipe's own, whose traceback its author wants.
    """
    name, colon, argument = spec.partition(":")
    path = _path(name)
    if not path.is_file():
        raise _missing(path)
    if path.suffix in _FILES:
        if colon:
            raise schema.ConfigError(
                f"--config={spec}: {path.name} has no variants: leave the colon out."
            )
        return _read(path, section)
    try:
        values = _module(path).get_config(*([argument] if colon else []))
    # A recipe may raise anything; what cannot be explained goes on as it is.
    except Exception as error:
        message = _explain(error, path)
        if message is None:
            raise
        raise schema.ConfigError(message) from error
    if not isinstance(values, ml_collections.ConfigDict):
        raise schema.ConfigError(
            f"get_config() of the recipe returned a {type(values).__name__}: return "
            "the ConfigDict of tlt_jax.config.default()."
        )
    return values


def override(
    values: ml_collections.ConfigDict, changes: Sequence[tuple[str, Any]]
) -> None:
    """Set keys (dotted) of a recipe; of equal ones the last counts.

    A recipe's `task.options` are its task's: with another `task.name` they go.
    """
    given = dict(changes)
    for options, owner in _OWNED.items():
        if owner in given and given[owner] != _get(values, owner):
            changes = [(options, {}), *changes]
    # Whoever builds the settings checks the types, and can say what is accepted.
    with values.unlocked(), values.ignore_type():
        for key, value in changes:
            _set(values, key, value)


def summaries(folder: pathlib.Path) -> Iterator[Summary]:
    """Yield what the recipes of a folder say of themselves; none is run."""
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        doc = ast.get_docstring(tree)
        if not doc:
            continue
        programs = re.findall(r"python -m ([\w.]+)", doc)
        if "tlt_jax.launch" in programs:
            programs.append("tlt_jax.main")
        yield Summary(
            path, doc.splitlines()[0], tuple(dict.fromkeys(programs)), _variants(tree)
        )


def _variants(tree: ast.Module) -> tuple[str, ...]:
    """Names of the mapping or tuple `VARIANTS` in a recipe."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            names = getattr(node.value, "keys", None) or node.value.elts
            return tuple(ast.literal_eval(name) for name in names)
    return ()


def _get(values: ml_collections.ConfigDict, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if values else None
    return values


def _set(values: ml_collections.ConfigDict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if section not in values:
            values[section] = ml_collections.ConfigDict()
        values = values[section]
    if isinstance(value, dict):
        # In the place of what is there, not besides.
        values[name] = ml_collections.ConfigDict()
        for free, item in value.items():
            values[name][free] = item
    else:
        values[name] = value


def _path(name: str) -> pathlib.Path:
    """Return the file that is named, by its path or as a module."""
    path = pathlib.Path(name)
    named = path.suffix in {".py", *_FILES} or not re.fullmatch(r"\w+(\.\w+)*", name)
    if named or path.is_file():
        return path
    try:
        found = importlib.util.find_spec(name)
    except ImportError:
        found = None
    return pathlib.Path(found.origin) if found and found.origin else path


def _missing(path: pathlib.Path) -> schema.ConfigError:
    kinds = {".py", *_FILES}
    beside = [str(other) for other in path.parent.glob("*") if other.suffix in kinds]
    near = difflib.get_close_matches(str(path), sorted(beside), 1)
    hint = f"did you mean {near[0]}?" if near else "recipes are files in configs/."
    return schema.ConfigError(f"--config={path}: there is no such file; {hint}")


def _read(path: pathlib.Path, section: type) -> ml_collections.ConfigDict:
    try:
        values = text.from_yaml(path.read_text("utf-8"))
        schema.check_keys(section, values)
    except (schema.ConfigError, UnicodeDecodeError) as error:
        raise schema.ConfigError(f"{path}: {error}") from error
    return ml_collections.ConfigDict(values)


def _module(path: pathlib.Path) -> Any:
    name = f"{path.stem}_recipe"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(
            f"--config={path}: recipes are .py files, or a run's config.yaml."
        )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config(): see configs/tiny.py.")
    return module


def _explain(error: Exception, recipe: pathlib.Path) -> str | None:
    """Say in one line what went wrong; None if only a traceback can."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    inner, line = _in_recipe(error, recipe)
    place = ""
    # A recipe that refuses its argument has said all.
    if line and not (line.line or "").startswith("raise "):
        place = f"{recipe}:{line.lineno}: {line.line}: "
    if isinstance(inner, ValueError | TypeError | ImportError):
        return place + str(inner).splitlines()[0]
    source = traceback.extract_tb(inner.__traceback__)[-1].filename
    if not isinstance(inner, AttributeError | KeyError):
        return None
    if "ml_collections" not in source:
        return None
    named = re.search(r"Key \"(\w+)\"|'(\w+)'", str(inner).replace("\\'", "'"))
    near = re.search(r'Did you mean "(\w+)"', str(inner))
    key = (named[1] or named[2]) if named else "?"
    hint = f": did you mean {near[1]!r}?" if near else "."
    return f"{place}unknown config key {key!r}{hint}"


def _in_recipe(
    error: BaseException, recipe: pathlib.Path
) -> tuple[BaseException, traceback.FrameSummary | None]:
    """Return the first exception of the chain that passed the recipe, and where."""
    link: BaseException | None = error
    while link is not None:
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            if pathlib.Path(frame.filename).resolve() == recipe.resolve():
                return link, frame
        link = link.__context__
    return error, None
