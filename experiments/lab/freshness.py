"""Whether a table still is what its experiment would make: by hashes of the source.

A table's provenance holds a hash of the experiment's module and of what it imports from
this folder. Left out is what makes no entry of a table: docstrings, comments, functions
that draw (`plot...`, `_plot...`), calls that draw, print, write or ask where to, and
names that nothing else reads. Where the code is another by now the table is stale: it
is not continued, and listings say so. What the package itself computes is not hashed;
the record's commit tells it.
"""

import ast
import hashlib
import json
import pathlib

FOLDER = pathlib.Path(__file__).parents[1]
# How tables and plots are written, for all.
SHARED = {"harness", "plotting", "freshness", "cells", "machine"}
# How calls begin that show what was found, or ask where to write it.
_SHOWING = (
    *("plot", "print", "matplotlib.", "harness.write_"),
    *("provenance.write", "trace_file.write"),
    *("harness.add_options", "cells.add_options"),
    *(f"parser.add_argument('--{name}'" for name in ("scale", "out")),
)

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
    # What is imported from this folder is hashed itself.
    tree.body = [node for node in tree.body if not _is_import(node)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            first = int(bool(body) and _is_docstring(body[0]))
            node.body = [other for other in body[first:] if not _shows(other)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = _read(node.body)
    return ast.dump(tree)


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _shows(node: ast.stmt) -> bool:
    """Whether this draws, prints or writes what was found, and makes nothing of it."""
    if isinstance(node, ast.FunctionDef):
        return node.name.lstrip("_").startswith("plot")
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return ast.unparse(node).lstrip("_").startswith(_SHOWING)


def _read(body: list[ast.stmt]) -> list[ast.stmt]:
    """Leaves out assignments to names that nothing reads."""
    read = {
        node.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }

    def is_read(node):
        if not isinstance(node, ast.Assign):
            return True
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return len(names) < len(node.targets) or not read.isdisjoint(names)

    kept = [node for node in body if is_read(node)]
    return kept if len(kept) == len(body) else _read(kept)


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
