"""Drafters that come with the package, by the name of the model that they serve.

Each is a directory of `io.save` in bfloat16, with a card that says what it was trained
on and what it brings. Embedding and head are the target's and are not in it.
"""

import difflib
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models.drafters import drafter, io

FOLDER = pathlib.Path(__file__).resolve().parent / "shipped"
CARD = "CARD.md"


def names() -> list[str]:
    """Return the names of all."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{io.CONFIG_FILE}"))


def save(
    name: str,
    params: drafter.DrafterParams,
    cfg: drafter.DrafterConfig,
    about: Mapping[str, Any],
    notes: str = "",
) -> pathlib.Path:
    """Put a drafter into the package, in place of an older one; return its directory.

    Args:
      name: of the model that it serves, as `model.spec` has it.
      params, cfg: see `io.save`; weights are written as bfloat16.
      about: what it was made of and what was measured: rows of the card.
      notes: Markdown that the card ends with.

    Raises:
      ValueError: the name is a path.
    """
    if os.path.basename(name) != name or name.startswith("."):
        raise ValueError(f"name={name!r}: give a name, not a path.")

    def narrowed(leaf):
        is_measured = leaf.ndim == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf if is_measured else leaf.astype(jnp.bfloat16))

    directory = FOLDER / name
    io.save(directory, jax.tree.map(narrowed, params), cfg, about)
    path = directory / io.WEIGHTS_FILE
    # Everybody's who installs the package, whoever built it.
    path.chmod(0o644)
    weights = path.read_bytes()
    rows = dict(about) | {
        "weights": f"{len(weights) / 1e6:.1f} MB, bfloat16, sha256 "
        f"{hashlib.sha256(weights).hexdigest()}"
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    card = f"# A drafter for {name}\n\n| what | value |\n| --- | --- |\n{table}"
    (directory / CARD).write_text(card + (f"\n{notes}" if notes else ""))
    return directory


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
