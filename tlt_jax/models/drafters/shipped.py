"""Drafters that come with the package, by the name of the model that they serve.

Each is a directory of `io.save` in bfloat16, with a card that says what it was trained
on and what it brings. Embedding and head are the target's and are not in it.
"""

import difflib
import os
import pathlib

from tlt_jax.models.drafters import io

FOLDER = pathlib.Path(__file__).resolve().parent / "shipped"
CARD = "CARD.md"


def names() -> list[str]:
    """Return the names of all."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{io.CONFIG_FILE}"))


def folder(spec: str) -> str | None:
    """Return the directory of the drafter of this name, or None: `spec` is a path.

    A name stands before a directory of that name, which `./NAME` means.

    Raises:
      ValueError: it looks like a name, and nothing has it.
    """
    known = names()
    if spec in known:
        return str(FOLDER / spec)
    if os.path.basename(spec) != spec or spec.startswith("~") or os.path.exists(spec):
        return None
    near = difflib.get_close_matches(spec, known, 1)
    raise ValueError(
        f"the drafter {spec!r} is neither a directory here nor one that comes with the "
        f"package ({', '.join(known) or 'there is none'})"
        + (f": did you mean {near[0]!r}?" if near else ": name one of these.")
    )
