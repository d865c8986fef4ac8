"""The package's shape, read from its syntax trees: levels, sizes, docstrings."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tlt_jax"

# The folders and loose modules, lowest first. A module imports from its own folder and
# from lower levels, never in a circle; what stands on one level knows nothing of the
# rest of it.
LEVELS = (
    ("types", "settings"),
    ("config",),
    ("runtime/transport",),
    ("runtime",),
    ("foreign", "executors"),
    ("pallas_kernels/verify_attention", "pallas_kernels/one_column", "cpu_kernels"),
    ("models",),
    ("models/formats",),
    ("models/drafters",),
    ("specdec",),
    ("specdec/proposers", "specdec/tuners", "specdec/training"),
    ("specdec/texts",),
    ("rl/tasks", "rl/engine"),
    ("rl/workers", "rl/update"),
    ("rl/adaptation",),
    ("rl",),
    ("speculation", "workdir"),
    ("assembly",),
    ("policy",),
    ("viz",),
    ("train", "train_drafter"),
    ("main", "generate", "evaluate", "export", "report", "plots", "launch"),
    ("check_data",),
)
MAX_LINES = {"": 500, "pallas_kernels": 800, "cpu_kernels": 800}
MAX_FUNCTION_LINES = 120
MAX_FILES, MAX_TOP_LEVEL, MAX_TRAIN_LINES = 14, 16, 300


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


# Every test reads all trees: once is enough.
TREES = {path: parse(path) for path in modules()}


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_of(module: str) -> str:
    """Return the folder of a module, or a loose module's name."""
    parts = module.split(".")[1:]
    return "/".join(parts[:-1]) or parts[0]


def level_of(part: str) -> int:
    for level, names in enumerate(LEVELS):
        if part in names:
            return level
    raise AssertionError(f"{part} has no level: add it to LEVELS where it belongs.")


def imported(tree: ast.AST) -> set[str]:
    """Return dotted names of this repository's modules that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name."
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    roots = ("tlt_jax.", "experiments", "configs", "notebooks", "tests")
    # An array type stands in every signature: the one name that is imported itself.
    return {
        name.replace("types.Array", "types") for name in found if name.startswith(roots)
    }


def forbidden(module: str, tree: ast.AST) -> list[str]:
    """Return imports that a module may not have: upwards, sideways, or beyond."""
    part, bad = part_of(module), []
    for name in imported(tree):
        if not name.startswith("tlt_jax."):
            bad.append(name)
        elif part_of(name) != part and level_of(part_of(name)) >= level_of(part):
            bad.append(name)
    return sorted(bad)


def plain_modules() -> dict[str, tuple[pathlib.Path, ast.Module]]:
    return {
        name_of(path): (path, tree)
        for path, tree in TREES.items()
        if path.name != "__init__.py"
    }


def test_imports_go_downwards_and_in_no_circle():
    graph = {}
    for module, (_, tree) in plain_modules().items():
        assert forbidden(module, tree) == [], module
        graph[module] = imported(tree)
    # Raises CycleError, which names the circle.
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_modules_are_imported_not_names():
    """`from tlt_jax.rl.update import losses`, never a name out of a module."""
    for path, tree in TREES.items():
        for name in imported(tree):
            target = ROOT.joinpath(*name.split("."))
            assert target.with_suffix(".py").is_file() or target.is_dir(), (path, name)


def test_files_and_folders_can_be_held_in_the_head():
    for path, tree in TREES.items():
        kind = path.relative_to(PACKAGE).parts[0]
        most = MAX_LINES.get(kind, MAX_LINES[""])
        assert path.read_text().count("\n") <= most, path
        assert ast.get_docstring(tree), f"{path}: a module says its purpose"
    for folder in {path.parent for path in TREES} - {PACKAGE}:
        assert len(list(folder.glob("*.py"))) <= MAX_FILES, folder
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_LEVEL
    train = (PACKAGE / "train.py").read_text()
    assert train.count("\n") <= MAX_TRAIN_LINES


def test_functions_fit():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name}"


def test_package_files_hold_a_docstring_only():
    for path, tree in TREES.items():
        # A kernel's folder may export its function.
        if path.name == "__init__.py" and path.parent.parent.name != "pallas_kernels":
            assert len(tree.body) == 1 and ast.get_docstring(tree), path


def names_used(tree: ast.AST) -> set[str]:
    """Return all identifiers: names, attributes, imported names."""
    fields = ("id", "attr", "name")
    return {getattr(n, f) for n in ast.walk(tree) for f in fields if hasattr(n, f)}


def test_partition_specs_are_made_in_one_place():
    for path, tree in TREES.items():
        if path != PACKAGE / "runtime" / "sharding.py":
            assert "PartitionSpec" not in names_used(tree), path


def public_functions(tree: ast.Module):
    """Yield public functions, classes and methods of public classes."""
    for node in tree.body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    if not method.name.startswith("_"):
                        yield method


def test_public_functions_are_documented_and_typed():
    for path, tree in TREES.items():
        check_public_functions(path, tree)


def check_public_functions(path, tree):
    for node in public_functions(tree):
        where = f"{path}:{node.lineno} {node.name}"
        inherited = isinstance(node, ast.FunctionDef) and overrides(tree, node)
        assert ast.get_docstring(node) or inherited, f"{where} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{where} has no return type"
            left_out = undocumented_arguments(node)
            assert not left_out, f"{where}: Args: says nothing of {left_out}"


def undocumented_arguments(function: ast.FunctionDef) -> list[str]:
    """Return arguments that a docstring with `Args:` leaves out.

    Unless it says where the others stand.
    """
    head, _, text = (ast.get_docstring(function) or "").partition("Args:")
    if "for the arguments" in head:
        return []
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    names = [a.arg for a in given if a.arg not in ("self", "cls")]
    return [n for n in names if text and not re.search(rf"\b{n}\b", text)]


def overrides(tree: ast.Module, method: ast.FunctionDef) -> bool:
    """Say whether a method takes the place of a documented one of a base class."""
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    for owner in classes.values():
        if any(getattr(n, "lineno", 0) == method.lineno for n in owner.body):
            return bool(owner.bases)
    return False


def test_no_marks_of_unfinished_work():
    pattern = re.compile(r"\b(TODO|FIXME|XXX)\b|type: ignore")
    for path in modules():
        assert not pattern.search(path.read_text()), path


def test_the_checks_see_violations():
    tree = ast.parse(
        "from tlt_jax.rl.update import losses\nfrom tlt_jax.models import params"
    )
    assert forbidden("tlt_jax.models.layers", tree) == ["tlt_jax.rl.update.losses"]
    assert forbidden("tlt_jax.rl.collector", tree) == []
    # Upwards, and sideways on one level.
    assert forbidden("tlt_jax.types", tree) == [
        "tlt_jax.models.params",
        "tlt_jax.rl.update.losses",
    ]
    assert forbidden("tlt_jax.rl.workers.remote", tree) == ["tlt_jax.rl.update.losses"]
    assert forbidden("tlt_jax.train", ast.parse("from tests import judges"))
    for text in (
        "from jax.sharding import PartitionSpec as P",
        "x = jax.sharding.PartitionSpec(None)",
    ):
        assert "PartitionSpec" in names_used(ast.parse(text))
    (function,) = ast.parse('def f(a, b):\n    """F.\n\n    Args:\n      a: x."""').body
    assert undocumented_arguments(function) == ["b"]
    with pytest.raises(AssertionError, match="has no level"):
        level_of("utils")
