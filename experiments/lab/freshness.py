"""Whether a table still is what its experiment would make: by hashes of the source.

The hash covers the definitions (functions, classes, constants) that an experiment can
reach by name, from its own module into the others of this folder, into `tlt_jax`, and
into modules that it names in strings: recipes, programs that it starts. Whole modules
would be too coarse: nearly every one reaches nearly every other, so that an edit of the
report would make the length of accepted drafts stale.

Each definition is hashed by its syntax tree, wherever it stands: imports are left out,
and what is taken from an imported module is hashed by its own name. So nothing changes
where a definition moves or a module is renamed. Left out is also what makes no entry of
a table: docstrings, comments, annotations of functions, texts of errors and of help,
what draws, prints or writes what was found, and names that nothing else reads.

A reviewed change that alters no measured value may be *carried*: the record then names
both hashes, the commit and the reason (`python -m experiments carry SLUG --why=TEXT`).
"""

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
# Whose definitions are hashed; of others a name is all that is.
PACKAGES = ("experiments", "tlt_jax", "configs")
# How tables and plots are written, for all.
SHOWING_MODULES = (
    "tlt_jax.viz",
    *(
        f"experiments.lab.{name}"
        for name in ("cells", "freshness", "harness", "machine", "plotting")
    ),
)
# How calls begin that show what was found, or ask where to write it.
_SHOWING = (
    *("plot", "print", "matplotlib.", "harness.write_"),
    *("provenance.write", "trace_file.write"),
    *("harness.add_options", "cells.add_options"),
    *(f"parser.add_argument('--{name}'" for name in ("scale", "out")),
)
_SKIPPED_FIELDS = frozenset(
    ("ctx", "kind", "type_comment", "type_params", "returns", "type_ignores")
)

FRESH, STALE, PARTIAL, UNDATED, UNRUN = "fresh stale partial undated unrun".split()
CARRIED = "fresh (carried)"

# A module, and a name in it; no name: all of it.
_Reference = tuple[str, str]


def source_hash(slug: str) -> str:
    """Returns 12 hex digits that change with what an experiment measures."""
    return code(ROOT).hash_of(f"experiments.{slug}")


def status(slug: str, folder: pathlib.Path) -> str:
    """Tells of a table: fresh (carried or not), stale, partial, undated or unrun."""
    return of_table(slug, folder, f"{slug}.csv")


def of_table(slug: str, folder: pathlib.Path, table: str) -> str:
    """Does the same where the table is another file than `<slug>.csv`."""
    if not (folder / table).exists():
        return UNRUN
    path = folder / f"{slug}.json"
    record = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "source_hash" not in record:
        return UNDATED
    if not is_current(record, source_hash(slug)):
        return STALE
    cells = record.get("cells", {"done": 0, "wanted": 0})
    if cells["done"] < cells["wanted"]:
        return PARTIAL
    return CARRIED if record["source_hash"] != source_hash(slug) else FRESH


def is_current(record: Mapping, current: str) -> bool:
    """Tells whether a table was made by today's code, or was carried to it.

    Args:
      record: the table's provenance.
      current: hash of the code now.
    """
    reached = record.get("source_hash")
    for step in record.get("carried", ()):
        if reached == current:
            return True
        if step["from"] != reached:
            return False
        reached = step["to"]
    return reached == current


def carry(slug: str, folder: pathlib.Path, commit: str | None, why: str) -> str:
    """Says of a stale table that what changed alters nothing that it holds.

    Args:
      slug: of the experiment.
      folder: of its provenance.
      commit: at which the change was reviewed.
      why: the reason, for people.

    Returns:
      What became of it, in words.

    Raises:
      ValueError: there is no record with a hash, or no reason is given.
    """
    if not why.strip():
        raise ValueError(
            'carry needs --why="...": what shows that nothing measured changes.'
        )
    path = folder / f"{slug}.json"
    record = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "source_hash" not in record:
        raise ValueError(
            f"{path.name} tells no source_hash in {folder.name}: measure {slug} first."
        )
    current = source_hash(slug)
    if is_current(record, current):
        return "needs no carrying"
    steps = record.setdefault("carried", [])
    last = steps[-1]["to"] if steps else record["source_hash"]
    steps.append({"from": last, "to": current, "commit": commit, "why": why})
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return f"carried from {last} to {current}"


@functools.cache
def code(root: pathlib.Path) -> "Code":
    """Returns the code below a folder; it is read once in a process."""
    return Code(root, SHOWING_MODULES)


class Code:
    """Modules below a folder, read as far as somebody asks for them."""

    def __init__(self, root: pathlib.Path, showing: Sequence[str]):
        """Reads nothing yet.

        Args:
          root: folder of the packages.
          showing: modules and packages that are not hashed.
        """
        self._root, self._showing = root, tuple(showing)
        self._modules: dict[str, _Module | None] = {}
        self._hashed: dict[tuple[str, int], _Hashed] = {}

    def hash_of(self, module: str) -> str:
        """Hashes what can be reached from a module's `main`, or all of it."""
        own = self.module(module)
        first = "main" if own and "main" in own.places else ""
        digests = {found.digest for found in self.reached([(module, first)])}
        text = "\n".join(sorted(digests))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def reached(self, references: Sequence[_Reference]) -> list["_Hashed"]:
        """Returns the statements that can be reached from some, each once."""
        waiting, seen, found = list(references), set(), {}
        while waiting:
            reference = waiting.pop()
            if reference in seen:
                continue
            seen.add(reference)
            name, wanted = reference
            module = self.module(name)
            if module is None:
                continue
            if wanted in module.imports and wanted not in module.places:
                # Taken over from another module.
                waiting.extend(self.resolve(module.imports[wanted])[1])
                continue
            places = module.places.get(wanted, ()) if wanted else module.all_places
            for place in (*places, *module.loose):
                if (name, place) not in found:
                    hashed = self._hash(module, place)
                    found[name, place] = hashed
                    waiting.extend(hashed.references)
        return list(found.values())

    def module(self, name: str) -> "_Module | None":
        """Reads a module; None: there is none, or it shows and measures nothing."""
        if name not in self._modules:
            path = self._root.joinpath(*name.split(".")).with_suffix(".py")
            is_shown = any(
                name == shown or name.startswith(shown + ".") for shown in self._showing
            )
            is_ours = name.partition(".")[0] in PACKAGES and not is_shown
            made = _Module(name, path) if is_ours and path.exists() else None
            self._modules[name] = made
        return self._modules[name]

    def resolve(self, dotted: str) -> tuple[str, list[_Reference]]:
        """Returns how a dotted name is hashed, and what it refers to."""
        parts = dotted.split(".")
        if parts[0] not in PACKAGES:
            return dotted, []
        for count in range(len(parts), 0, -1):
            name = ".".join(parts[:count])
            if self.module(name) is not None:
                rest = parts[count:]
                return ".".join(rest) or "<module>", [(name, rest[0] if rest else "")]
        return parts[-1], []

    def named_in(self, text: str) -> list[_Reference]:
        """Returns the module that a string names as a file or by dots, if one."""
        path, _, _ = text.partition(":")
        if path.endswith(".py"):
            name = path.removesuffix(".py").replace("/", ".")
            names = [name, f"experiments.peers.{name}"]
        elif path.startswith(tuple(f"{package}." for package in PACKAGES)):
            names = [path]
        else:
            return []
        return [(name, "") for name in names if self.module(name) is not None][:1]

    def _hash(self, module: "_Module", place: int) -> "_Hashed":
        key = (module.name, place)
        if key not in self._hashed:
            writer = _Writer(self, module)
            writer.write(module.body[place])
            digest = hashlib.sha256("\n".join(writer.parts).encode()).hexdigest()
            self._hashed[key] = _Hashed(digest, frozenset(writer.references))
        return self._hashed[key]


@dataclasses.dataclass(frozen=True)
class _Hashed:
    """A statement's digest, and what it refers to."""

    digest: str
    references: frozenset[_Reference]


class _Module:
    """A module's statements by the names that they bind.

    Attributes:
      name: dotted.
      body: its statements, without docstring and imports.
      places: of the statements in `body` that bind a name.
      loose: those that bind none: they run wherever the module is imported.
      imports: what each imported name stands for, dotted.
    """

    def __init__(self, name: str, path: pathlib.Path):
        self.name = name
        tree = ast.parse(path.read_text("utf-8"))
        self.imports = dict(_imports(tree))
        self.body = [
            node
            for node in tree.body
            if not _is_import(node) and not _is_text(node) and not _is_start(node)
        ]
        self.places: dict[str, list[int]] = {}
        self.loose: list[int] = []
        for place, node in enumerate(self.body):
            if _shows(node):
                continue
            names = _bound(node)
            for bound in names:
                self.places.setdefault(bound, []).append(place)
            if not names:
                self.loose.append(place)

    @property
    def all_places(self) -> list[int]:
        """Places of all that is hashed, in order."""
        return sorted({place for places in self.places.values() for place in places})


class _Writer:
    """Writes a statement as text that does not depend on where it stands."""

    def __init__(self, code: Code, module: _Module):
        self.parts: list[str] = []
        self.references: set[_Reference] = set()
        self._code, self._module = code, module
        self._scopes: list[frozenset[str]] = []
        self._in_function = 0

    def write(self, node: object) -> None:
        """Appends a node, and all below it."""
        own = getattr(self, f"_{type(node).__name__}", None)
        if own is not None:
            own(node)
        elif isinstance(node, list):
            self.parts.append("[")
            for item in node:
                self.write(item)
            self.parts.append("]")
        elif isinstance(node, ast.AST):
            self._fields(node, node._fields)
        else:
            self.parts.append(repr(node))

    def _fields(self, node: ast.AST, names: Sequence[str]) -> None:
        self.parts.append(type(node).__name__)
        for name in names:
            value = getattr(node, name, None)
            if value is None or value == [] or name in _SKIPPED_FIELDS:
                continue
            self.parts.append(name)
            self.write(value)

    def _is_local(self, name: str) -> bool:
        return any(name in scope for scope in self._scopes)

    def _take(self, resolved: tuple[str, list[_Reference]]) -> None:
        text, references = resolved
        self.parts.append(text)
        self.references.update(references)

    def _Name(self, node: ast.Name) -> None:
        name, module = node.id, self._module
        if self._is_local(name):
            self.parts.append(name)
        elif name in module.places:
            self._take((name, [(module.name, name)]))
        elif name in module.imports:
            self._take(self._code.resolve(module.imports[name]))
        else:
            self.parts.append(name)

    def _Attribute(self, node: ast.Attribute) -> None:
        names, first = [], node
        while isinstance(first, ast.Attribute):
            names.append(first.attr)
            first = first.value
        if isinstance(first, ast.Name) and not self._is_local(first.id):
            stands_for = self._module.imports.get(first.id)
            if stands_for and first.id not in self._module.places:
                dotted = ".".join([stands_for, *reversed(names)])
                self._take(self._code.resolve(dotted))
                return
        self.parts.append("." + node.attr)
        self.write(node.value)

    def _Constant(self, node: ast.Constant) -> None:
        self.parts.append(repr(node.value))
        if isinstance(node.value, str):
            self.references.update(self._code.named_in(node.value))

    def _JoinedStr(self, node: ast.JoinedStr) -> None:
        # Interpreters differ in how they divide the text between the values.
        self.parts.append("f-string")
        for is_text, group in itertools.groupby(
            node.values, lambda value: isinstance(value, ast.Constant)
        ):
            if is_text:
                text = "".join(value.value for value in group)
                self.parts.extend([repr(text)] if text else [])
            else:
                self.write(list(group))

    def _Raise(self, node: ast.Raise) -> None:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        self.parts.append("raise")
        self.write(kind)

    def _Call(self, node: ast.Call) -> None:
        self.parts.append("call")
        self.write(node.func)
        self.write(node.args)
        is_option = getattr(node.func, "attr", "") == "add_argument"
        for keyword in node.keywords:
            if not (is_option and keyword.arg == "help"):
                self.write(keyword)

    def _arg(self, node: ast.arg) -> None:
        self.parts.append(node.arg)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        # Of a class an annotation may say how a setting is read.
        is_field = not self._in_function and node.simple
        self._fields(node, node._fields if is_field else ("target", "value"))

    def _ClassDef(self, node: ast.ClassDef) -> None:
        self.parts.append(f"class {node.name}")
        self._scopes.append(frozenset())
        inner, self._in_function = self._in_function, 0
        for part in (node.bases, node.keywords, node.decorator_list):
            self.write(part)
        self._statements(node.body)
        self._in_function = inner
        self._scopes.pop()

    def _FunctionDef(self, node: ast.FunctionDef) -> None:
        self.parts.append(f"def {node.name}")
        self.write(node.decorator_list)
        self._function(node, _read(_kept(node.body)))

    _AsyncFunctionDef = _FunctionDef

    def _Lambda(self, node: ast.Lambda) -> None:
        self.parts.append("lambda")
        self._function(node, [node.body])

    def _function(self, node: ast.FunctionDef | ast.Lambda, body: list) -> None:
        args = node.args
        self.write([*args.defaults, *filter(None, args.kw_defaults)])
        self._scopes.append(_local_names(node))
        self._in_function += 1
        self._fields(args, ("posonlyargs", "args", "vararg", "kwonlyargs", "kwarg"))
        for statement in body:
            self.write(statement)
        self._in_function -= 1
        self._scopes.pop()

    def _statements(self, body: Sequence[ast.stmt]) -> None:
        for statement in _kept(body):
            self.write(statement)

    def _If(self, node: ast.If) -> None:
        self.parts.append("if")
        self.write(node.test)
        self._branches(node, ("body", "orelse"))

    def _For(self, node: ast.For) -> None:
        self.parts.append("for")
        self.write(node.target)
        self.write(node.iter)
        self._branches(node, ("body", "orelse"))

    def _While(self, node: ast.While) -> None:
        self.parts.append("while")
        self.write(node.test)
        self._branches(node, ("body", "orelse"))

    def _With(self, node: ast.With) -> None:
        self.parts.append("with")
        self.write(node.items)
        self._branches(node, ("body",))

    def _branches(self, node: ast.AST, names: Sequence[str]) -> None:
        for name in names:
            self.parts.append(f":{name}")
            self._statements(getattr(node, name))


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Pairs of a name and the dotted name that it was imported for."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for branch in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(node, branch, ())
            waiting.extend(inner if isinstance(inner, list) else ())
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
                else:
                    first = alias.name.partition(".")[0]
                    yield first, first


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a module binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    return _stored([node])


def _local_names(function: ast.FunctionDef | ast.Lambda) -> frozenset[str]:
    """Parameters of a function, and the names that it binds."""
    args = function.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    body = function.body if isinstance(function.body, list) else [function.body]
    return frozenset({arg.arg for arg in every if arg} | _stored(body))


def _stored(nodes: Sequence[ast.AST]) -> set[str]:
    names, not_local = set(), set()
    for statement in nodes:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                names.add(node.name)
            elif isinstance(node, ast.Global):
                not_local.update(node.names)
    return names - not_local


def _kept(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Leaves out docstrings, imports and what only shows."""
    return [
        node
        for node in body
        if not (_is_text(node) or _is_import(node) or _shows(node))
    ]


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_start(node: ast.stmt) -> bool:
    """Whether this is `if __name__ == "__main__"`."""
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__"
        for part in ast.walk(node.test)
    )


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
