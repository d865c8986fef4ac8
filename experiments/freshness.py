"""Whether a table still is what its experiment would make: by hashes of the source.

A table's provenance holds a hash of the experiment's module and of what it imports from
this folder, docstrings and comments left out. Where the code is another by now the
table is stale: it is not continued, and listings say so. What the package itself
computes is not hashed; the record's commit tells it.
"""

import ast
import hashlib
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
# How tables and plots are written, for all.
SHARED = {"harness", "plotting", "freshness", "cells"}

FRESH, STALE, PARTIAL, UNDATED, UNRUN = "fresh stale partial undated unrun".split()


def source_hash(slug: str) -> str:
    """Returns 12 hex digits that change with an experiment's code."""
    digest = hashlib.sha256()
    for path in sorted(_sources(FOLDER / f"{slug}.py", set())):
        digest.update(str(path.relative_to(FOLDER)).encode())
        digest.update(_code(path).encode())
    return digest.hexdigest()[:12]


def status(slug: str, folder: pathlib.Path) -> str:
    """Tells of a table: fresh, stale, partial, undated (no hash) or unrun."""
    return of_table(slug, folder, f"{slug}.csv")


def of_table(slug: str, folder: pathlib.Path, table: str) -> str:
    """Does the same where the table is another file than `<slug>.csv`."""
    if not (folder / table).exists():
        return UNRUN
    path = folder / f"{slug}.json"
    record = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "source_hash" not in record:
        return UNDATED
    if record["source_hash"] != source_hash(slug):
        return STALE
    cells = record.get("cells", {"done": 0, "wanted": 0})
    return PARTIAL if cells["done"] < cells["wanted"] else FRESH


def _sources(path: pathlib.Path, found: set[pathlib.Path]) -> set[pathlib.Path]:
    """The module and those of this folder that it imports, directly or not."""
    if path in found or not path.exists():
        return found
    found.add(path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == FOLDER.name and parts[1:] and parts[-1] not in SHARED:
                _sources(FOLDER.joinpath(*parts[1:]).with_suffix(".py"), found)
    return found


def _code(path: pathlib.Path) -> str:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return ast.dump(tree)


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
