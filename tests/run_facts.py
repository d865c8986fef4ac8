"""What must be equal of two runs: everything that they left on disk but times."""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_LEFT_OVER = re.compile(
    r"\.part(ial)?$|\.tmp|tmp$|orbax-checkpoint-tmp|/\.initial_model"
)


def of(directory: pathlib.Path) -> dict[str, Any]:
    """Returns everything of a finished run that must be equal, by name."""
    found: dict[str, Any] = {"files": [], "left over": []}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if _LEFT_OVER.search(f"/{name}"):
            found["left over"].append(name)
        elif not name.startswith(("checkpoints/", "drafter_checkpoints/")):
            found["files"].append(name)
        if name.startswith(("initial_model/", "tokenizer/")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found["steps"] = [row["step"] for row in rows]
    for row in rows:
        for name, value in row.items():
            if not name.endswith("_s"):
                found[f"row {row['step']} {name}"] = value
    for path in sorted(directory.glob("rollouts/*")):
        for line in map(json.loads, path.read_text().splitlines()):
            step = int(path.stem.removeprefix("step_"))
            drafted = line.pop("drafted")
            found.setdefault(f"rollouts {step}", []).append(line)
            found.setdefault(f"rollouts {step} drafted", []).append(drafted)
    for folder in ("checkpoints", "drafter_checkpoints"):
        steps = [int(path.name) for path in directory.glob(f"{folder}/[0-9]*")]
        if steps:
            found[f"{folder}/ newest"] = max(steps)
            found |= _checkpoint_facts(directory, f"{folder}/{max(steps)}")
    return found


def _checkpoint_facts(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """Returns a digest of every array of a checkpoint, and its record."""
    found = {}
    reader = ocp.PyTreeCheckpointer()
    for item in ("policy", "optimizer", "arrays", "rollouts"):
        path = directory / name / item
        if not path.is_dir():
            continue
        described = reader.metadata(path).item_metadata.tree
        wanted = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described
        )
        tree = reader.restore(path, restore_args=wanted)
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(leaf)
            text = f"{array.shape} {array.dtype} ".encode() + array.tobytes()
            key = f"{name}/{item}{jax.tree_util.keystr(key)}"
            found[key] = hashlib.sha256(text).hexdigest()
    record = json.loads((directory / name / "meta" / "metadata").read_text())
    for key in ("parts", "meta", "arrays"):
        for part, its in record["driver"].get(key, {}).items():
            # It is made of seconds.
            if part != "budget":
                found[f"{name}/record {key} {part}"] = its
    return found


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], ignored: str = ""
) -> list[str]:
    """Returns what is different, one line each, digests first."""
    lines = []
    if found["left over"]:
        lines.append(f"left over: {', '.join(found['left over'])}")
    names = found.keys() | wanted.keys()
    for name in sorted(names, key=lambda name: (not name.endswith("digest"), name)):
        if name == "left over" or (ignored and re.match(ignored, name)):
            continue
        ours, theirs = found.get(name, "absent"), wanted.get(name, "absent")
        if ours != theirs:
            lines.append(f"{name}: {_short(ours, theirs)}")
    return lines


def _short(ours: Any, theirs: Any) -> str:
    if isinstance(ours, list) and isinstance(theirs, list):
        only = [
            [x for x in a if x not in b] for a, b in ((ours, theirs), (theirs, ours))
        ]
        ours, theirs = only if any(only) else (ours, theirs)
    return f"{str(ours)[:150]} instead of {str(theirs)[:150]}"
