"""The package's shape, read from its syntax trees: layers, sizes, docstrings."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tlt_jax"

# A module imports from its own layer and the ones before it.
LAYERS = (
    (
        *("types", "schema", "config", "command_line", "compile_cache", "sharding"),
        *("metrics", "progress", "config_checks", "channel", "distributed"),
        *("speculation_config", "failures", "cpu_devices", "host_memory"),
    ),
    ("pallas_kernels", "cpu_kernels"),
    ("models",),
    ("specdec",),
    ("rl", "data", "data_files"),
    (
        *("checkpoint", "plots", "policy", "speculation", "workdir", "train"),
        *("main", "generate", "export", "launch"),
        *("drafter_config", "drafter_texts", "drafter_plots", "train_drafter"),
        *("drafter_checkpoint", "drafter_store", "plot_style", "timeline"),
        *("rollout_parts", "wandb_log", "check_data", "step_record"),
        *("speculation_trace", "tree_plots", "record_plots", "report"),
        *("report_page",),
    ),
    ("experiments", "notebooks", "configs"),
)
MAX_LINES = 500


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def ids(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(part: str) -> int:
    for level, names in enumerate(LAYERS):
        if part in names:
            return level
    raise AssertionError(f"{part} has no layer: add it to LAYERS where it belongs.")


def imported(tree: ast.AST) -> set[str]:
    """Return dotted names of this repository's modules that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name."
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    roots = ("tlt_jax.", "experiments", "configs", "notebooks")
    return {name for name in found if name.startswith(roots)}


def upward_imports(part: str, tree: ast.AST) -> list[str]:
    """Return imports that a module of `part` may not have."""
    bad = []
    for name in imported(tree):
        target = name.removeprefix("tlt_jax.").split(".")[0]
        if layer_of(target) > layer_of(part):
            bad.append(name)
    return sorted(bad)


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_imports_go_downwards(path):
    if path != PACKAGE / "__init__.py":
        assert upward_imports(part_of(path), parse(path)) == []


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_modules_are_imported_not_names(path):
    """`from tlt_jax.rl import losses`, never a name out of a module.

    The exception is `tlt_jax.types`, whose array type stands in every signature.
    """
    for name in imported(parse(path)):
        if name.startswith("tlt_jax.types."):
            continue
        target = ROOT.joinpath(*name.split("."))
        assert target.with_suffix(".py").is_file() or target.is_dir(), name


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_size_and_docstring(path):
    lines = path.read_text().count("\n")
    assert lines <= MAX_LINES
    assert ast.get_docstring(parse(path)), "a module says its purpose"


def test_package_files_hold_a_docstring_only():
    for path in PACKAGE.rglob("__init__.py"):
        body = parse(path).body
        # A kernel's folder may export its function.
        if path.parent.parent.name == "pallas_kernels":
            continue
        assert len(body) == 1 and ast.get_docstring(parse(path)), path


def names_used(tree: ast.AST) -> set[str]:
    """Return all identifiers: names, attributes, imported names."""
    fields = ("id", "attr", "name")
    return {getattr(n, f) for n in ast.walk(tree) for f in fields if hasattr(n, f)}


def test_partition_specs_are_made_in_one_place():
    for path in modules():
        if path != PACKAGE / "sharding.py":
            assert "PartitionSpec" not in names_used(parse(path)), path


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


@pytest.mark.parametrize("path", modules(), ids=ids)
def test_public_functions_are_documented_and_typed(path):
    for node in public_functions(parse(path)):
        where = f"{ids(path)}:{node.lineno} {node.name}"
        inherited = isinstance(node, ast.FunctionDef) and overrides(path, node)
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


def overrides(path: pathlib.Path, method: ast.FunctionDef) -> bool:
    """Say whether a method takes the place of a documented one of a base class."""
    classes = {n.name: n for n in parse(path).body if isinstance(n, ast.ClassDef)}
    for owner in classes.values():
        if any(getattr(n, "lineno", 0) == method.lineno for n in owner.body):
            return bool(owner.bases)
    return False


def test_no_marks_of_unfinished_work():
    pattern = re.compile(r"\b(TODO|FIXME|XXX)\b|type: ignore")
    for path in modules():
        assert not pattern.search(path.read_text()), path


def test_the_checks_see_violations():
    tree = ast.parse("from tlt_jax.rl import losses\nimport tlt_jax.models.params")
    assert upward_imports("models", tree) == ["tlt_jax.rl.update.losses"]
    assert upward_imports("rl", tree) == []
    assert upward_imports("types", tree) == [
        "tlt_jax.models.params",
        "tlt_jax.rl.update.losses",
    ]
    for text in (
        "from jax.sharding import PartitionSpec as P",
        "x = jax.sharding.PartitionSpec(None)",
    ):
        assert "PartitionSpec" in names_used(ast.parse(text))
    (function,) = ast.parse('def f(a, b):\n    """F.\n\n    Args:\n      a: x."""').body
    assert undocumented_arguments(function) == ["b"]
    with pytest.raises(AssertionError, match="has no layer"):
        layer_of("utils")
