"""What an experiment measures, as a hash of the source that it runs.

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
"""

import ast
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
# Whose definitions are hashed; of others a name is all that is.
PACKAGES = ("experiments", "tlt_jax", "configs")
# How tables and plots are written, for all.
_LAB = ("catalogue", "claims", "command_line", "experiment", "freshness", "plotting")
_LAB += ("pages", "provenance", "result_tables", "tables")
SHOWING_MODULES = (
    "tlt_jax.viz",
    *(f"experiments.lab.{name}" for name in _LAB),
)
# How calls begin that show what was found, or ask where to write it.
_SHOWING = ("plot", "print", "matplotlib.")
_SHOWING += ("tables.write", "record.write", "trace_file.write")
# Of a declaration: what is told of the experiment, and made of its tables.
_TOLD = {"text", "title", "published", "needs", "before", "larger"}
_TOLD |= {"plot", "claims", "sources"}
_SKIPPED_FIELDS = {"ctx", "kind", "type_comment", "type_params", "returns"}

# A module, and a name in it; no name: all of it.
_Reference = tuple[str, str]


def source_hash(slug: str) -> str:
    """Returns 12 hex digits that change with what an experiment measures."""
    return code(ROOT).hash_of(f"experiments.{slug}")


@functools.cache
def code(root: pathlib.Path) -> "Code":
    """Returns the code below a folder; it is read once in a process."""
    return Code(root, SHOWING_MODULES)


class Code:
    """Modules below a folder, read as far as somebody asks for them."""

    def __init__(self, root: pathlib.Path, showing: Sequence[str]):
        """Reads nothing yet; modules and packages that show are not hashed."""
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
            if (module := self.module(name)) is None:
                continue
            if wanted in module.imports and wanted not in module.places:
                # Taken over from another module.
                waiting.extend(self.resolve(module.imports[wanted])[1])
                continue
            for place in (*module.places_of(wanted), *module.loose):
                if (name, place) not in found:
                    hashed = self._hash(module, place)
                    found[name, place] = hashed
                    waiting.extend(hashed.references)
        return list(found.values())

    def module(self, name: str) -> "_Module | None":
        """Reads a module; None: there is none, or it shows and measures nothing."""
        if name not in self._modules:
            path = self._root.joinpath(*name.split(".")).with_suffix(".py")
            is_shown = any(f"{name}.".startswith(f"{s}.") for s in self._showing)
            is_ours = name.partition(".")[0] in PACKAGES and not is_shown
            is_read = is_ours and path.exists()
            self._modules[name] = _Module(name, path) if is_read else None
        return self._modules[name]

    def resolve(self, dotted: str) -> tuple[str, list[_Reference]]:
        """Returns how a dotted name is hashed, and what it refers to."""
        parts = dotted.split(".")
        if parts[0] not in PACKAGES:
            return dotted, []
        for count in range(len(parts), 0, -1):
            name = ".".join(parts[:count])
            if self.module(name) is not None:
                first, *_ = rest = parts[count:] or [""]
                return ".".join(rest) or "<module>", [(name, first)]
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
            self._hashed[key] = _Hashed(digest, writer.references)
        return self._hashed[key]


class _Hashed(NamedTuple):
    """A statement's digest, and what it refers to."""

    digest: str
    references: set[_Reference]


class _Module:
    """A module's statements by the names that they bind.

    `places` are those in `body`, the statements that are hashed; `loose` are those that
    bind no name: they run wherever the module is imported. Imports are dotted.
    """

    def __init__(self, name: str, path: pathlib.Path):
        self.name = name
        tree = ast.parse(path.read_text("utf-8"))
        # Of two imports of a name the first one counts.
        self.imports = dict(reversed([*_imports(tree)]))
        self.body = [
            node for node in tree.body if not (_is_left_out(node) or _is_start(node))
        ]
        self.places: dict[str, list[int]] = {}
        self.loose: list[int] = []
        for place, node in enumerate(self.body):
            is_named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            names = {node.name} if is_named else _stored([node])
            for bound in names:
                self.places.setdefault(bound, []).append(place)
            if not names:
                self.loose.append(place)

    def places_of(self, name: str) -> Iterable[int]:
        """Places of a name's statements; of all that is hashed where it is empty."""
        return self.places.get(name, ()) if name else {*sum(self.places.values(), [])}


class _Writer:
    """Writes a statement as text that does not depend on where it stands."""

    def __init__(self, code: Code, module: _Module):
        self.parts: list[str] = []
        self.references: set[_Reference] = set()
        self._code, self._module = code, module
        self._scopes: list[frozenset[str]] = []

    def write(self, node: object, *skipped: str) -> None:
        """Appends a node, and all below it but for some fields."""
        own = None if skipped else getattr(self, f"_{type(node).__name__}", None)
        if own is not None:
            own(node)
        elif isinstance(node, list):
            self.parts.append("[")
            for item in node:
                if not (isinstance(item, ast.stmt) and _is_left_out(item)):
                    self.write(item)
            self.parts.append("]")
        elif isinstance(node, ast.AST):
            self.parts.append(type(node).__name__)
            left_out = _SKIPPED_FIELDS.union(skipped)
            for name in node._fields:
                value = getattr(node, name, None)
                if value not in (None, []) and name not in left_out:
                    self.parts.append(name)
                    self.write(value)
        else:
            self.parts.append(repr(node))

    def _dotted(self, dotted: str) -> None:
        text, references = self._code.resolve(dotted)
        self.parts.append(text)
        self.references.update(references)

    def _is_local(self, name: str) -> bool:
        return any(name in scope for scope in self._scopes)

    def _imported(self, node: ast.expr) -> str | None:
        """What a name stands for that is imported, and bound nowhere nearer."""
        if not isinstance(node, ast.Name) or self._is_local(node.id):
            return None
        is_bound = node.id in self._module.places
        return None if is_bound else self._module.imports.get(node.id)

    def _Name(self, node: ast.Name) -> None:
        if dotted := self._imported(node):
            self._dotted(dotted)
            return
        self.parts.append(node.id)
        if node.id in self._module.places and not self._is_local(node.id):
            self.references.add((self._module.name, node.id))

    def _Attribute(self, node: ast.Attribute) -> None:
        names, first = [node.attr], node.value
        while isinstance(first, ast.Attribute):
            names.append(first.attr)
            first = first.value
        if dotted := self._imported(first):
            self._dotted(".".join([dotted, *reversed(names)]))
        else:
            self.parts.append("." + node.attr)
            self.write(node.value)

    def _Constant(self, node: ast.Constant) -> None:
        self.parts.append(repr(node.value))
        if isinstance(node.value, str):
            self.references.update(self._code.named_in(node.value))

    def _JoinedStr(self, node: ast.JoinedStr) -> None:
        # Interpreters differ in how they divide the text between the values.
        text = ""
        for value in [*node.values, None]:
            if isinstance(value, ast.Constant):
                text += value.value
            else:
                self.write([text, value])
                text = ""

    def _Raise(self, node: ast.Raise) -> None:
        self.write(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def _Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", "")
        told = {"Experiment": _TOLD, "Option": {"help"}}.get(called, ())
        self.write(node.func)
        # The third of an option is its help, too.
        self.write(node.args[:2] if called == "Option" else node.args)
        self.write([k for k in node.keywords if k.arg not in told])

    def _arg(self, node: ast.arg) -> None:
        self.parts.append(node.arg)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        # Of a class an annotation may say how a setting is read.
        is_field = bool(self._scopes) and not self._scopes[-1]
        self.write(node, *(["lineno"] if is_field else ["annotation", "simple"]))

    def _ClassDef(self, node: ast.ClassDef) -> None:
        self._scopes.append(frozenset())
        self.write(node, "lineno")
        self._scopes.pop()

    def _FunctionDef(self, node: ast.FunctionDef) -> None:
        self.parts.append(f"def {node.name}")
        self.write(node.decorator_list)
        body = [part for part in node.body if not _is_left_out(part)]
        self._function(node.args, _read(body))

    def _Lambda(self, node: ast.Lambda) -> None:
        self._function(node.args, [node.body])

    def _function(self, args: ast.arguments, body: list[ast.AST]) -> None:
        self.write([*args.defaults, *filter(None, args.kw_defaults)])
        names = {node.arg for node in ast.walk(args) if isinstance(node, ast.arg)}
        # A function's scope has a name at least, and so is told from a class's.
        self._scopes.append(frozenset({"", *names, *_stored(body)}))
        self.write(args, "defaults", "kw_defaults")
        self.write(body)
        self._scopes.pop()


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Pairs of a name and the dotted name that it was imported for."""
    for node in ast.walk(tree):
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


def _stored(nodes: Sequence[ast.AST]) -> set[str]:
    """The names that are bound somewhere in some nodes, but for global ones."""
    names, not_local = set(), set()
    for node in itertools.chain.from_iterable(map(ast.walk, nodes)):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.FunctionDef() | ast.ClassDef() | ast.ExceptHandler():
                names.add(node.name)
            case ast.Global(names=found):
                not_local.update(found)
    return names - not_local - {None}


def _is_left_out(node: ast.stmt) -> bool:
    """Whether this is a text, an import, or only shows."""
    if isinstance(node, (ast.Import, ast.ImportFrom)) or _shows(node):
        return True
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def _is_start(node: ast.stmt) -> bool:
    """Whether this is `if __name__ == "__main__"`."""
    return isinstance(node, ast.If) and "__name__" in _loaded([node.test])


def _shows(node: ast.stmt) -> bool:
    """Whether this draws, prints or writes what was found, and makes nothing of it."""
    if isinstance(node, ast.FunctionDef):
        return node.name.lstrip("_").startswith("plot")
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return ast.unparse(node).lstrip("_").startswith(_SHOWING)


def _loaded(nodes: Sequence[ast.AST]) -> set[str]:
    """The names that are read somewhere in some nodes."""
    parts = itertools.chain.from_iterable(map(ast.walk, nodes))
    names = (part for part in parts if isinstance(part, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def _read(body: list[ast.stmt]) -> list[ast.stmt]:
    """Leaves out assignments to names that nothing reads."""
    read = _loaded(body)

    def is_read(node):
        if not isinstance(node, ast.Assign):
            return True
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return len(names) < len(node.targets) or not read.isdisjoint(names)

    kept = [node for node in body if is_read(node)]
    return kept if len(kept) == len(body) else _read(kept)
