"""A table is stale when what it measured is another by now, and at nothing else."""

import json
import time

import pytest

from experiments.lab import freshness, provenance


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A tree with an experiment, read anew whenever its hash is asked for."""
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    files = {}

    def source_hash(**changed):
        files.update(changed)
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
        freshness.code.cache_clear()
        return freshness.source_hash("made")

    yield source_hash
    freshness.code.cache_clear()


def test_the_source_hash_is_of_the_code_and_what_it_imports(code, tmp_path):
    made = "from experiments.parts import a\nCOUNT = a.X\n"
    first = code(experiments__made=made, experiments__parts__a="X = 1\n")
    same = '"""Other words."""\n# A comment.\n' + made
    assert code(experiments__made=same) == first
    changed = code(experiments__parts__a="X = 2\n")
    assert changed != first
    results = tmp_path / "results"
    results.mkdir()
    assert provenance.status("made", results) == provenance.UNRUN
    (results / "made.csv").write_text("a\n1\n")
    assert provenance.status("made", results) == provenance.UNDATED
    record = results / "made.json"
    record.write_text(json.dumps({"source_hash": changed}))
    assert provenance.status("made", results) == provenance.FRESH
    cut = {"source_hash": changed, "cells": {"wanted": 3, "done": 2}}
    record.write_text(json.dumps(cut))
    assert provenance.status("made", results) == provenance.PARTIAL
    record.write_text(json.dumps({"source_hash": changed}))
    code(experiments__parts__a="X = 3\n")
    assert provenance.status("made", results) == provenance.STALE


def test_a_carried_table_is_fresh_until_the_next_change(code, tmp_path):
    (tmp_path / "made.csv").write_text("a\n1\n")
    hashes = [code(experiments__made=f"X = {n}\n") for n in (1, 2, 3, 4)]
    record = tmp_path / "made.json"
    record.write_text(json.dumps({"source_hash": hashes[0]}))
    for number, why in ((2, "equal digests"), (3, "equal counts")):
        code(experiments__made=f"X = {number}\n")
        assert provenance.status("made", tmp_path) == provenance.STALE
        with pytest.raises(ValueError, match="carry needs --why"):
            provenance.carry("made", tmp_path, "abc", " ")
        told = provenance.carry("made", tmp_path, "abc", why)
        assert told == f"carried from {hashes[number - 2]} to {hashes[number - 1]}"
        assert provenance.status("made", tmp_path) == provenance.CARRIED
    assert provenance.carry("made", tmp_path, "abc", "again") == "needs no carrying"
    told = json.loads(record.read_text())
    assert told["source_hash"] == hashes[0]
    assert [step["why"] for step in told["carried"]] == [
        "equal digests",
        "equal counts",
    ]
    assert told["carried"][0]["commit"] == "abc"
    code(experiments__made="X = 4\n")
    assert provenance.status("made", tmp_path) == provenance.STALE
    # A chain with a link missing carries nothing.
    told["carried"] = told["carried"][1:]
    assert not provenance.is_current(told, hashes[2])
    with pytest.raises(ValueError, match=r"other.json tells no source_hash"):
        provenance.carry("other", tmp_path, "abc", "equal")


MADE = """
from experiments.parts import a
from tlt_jax.old import place

def main():
    return a.measured(place.Thing(3))
"""
PLACE = """
import numpy as np

from tlt_jax.old import limits

def unused():
    return 1

class Thing:
    '''A thing.'''

    def __init__(self, size: int):
        self.size = size

    def double(self) -> int:
        if self.size > limits.MOST:
            raise ValueError(f"{self.size} is too much")
        return np.sum([self.size, _half(limits) * 4])

def _half(place):
    return place.MOST / 2
"""


@pytest.fixture
def package(code):
    """The hash of an experiment that runs code of a package."""
    first = code(
        experiments__made=MADE,
        experiments__parts__a="def measured(thing):\n    return thing.double()\n",
        tlt_jax__old__place=PLACE,
        tlt_jax__old__limits="MOST = 10\nLEAST = 1\n",
    )
    return code, first


def test_moves_leave_the_hash(package):
    code, first = package
    made = MADE.replace("tlt_jax.old import place", "tlt_jax.new import seat as chair")
    renamed = PLACE.replace("tlt_jax.old", "tlt_jax.new")
    moved = code(
        experiments__made=made.replace("place.Thing", "chair.Thing"),
        tlt_jax__old__place=None,
        tlt_jax__old__limits=None,
        tlt_jax__new__seat=renamed,
        tlt_jax__new__limits="LEAST = 1\nMOST = 10\n",
    )
    assert moved == first
    # A definition moves to another file, which takes it from there.
    constant = "from tlt_jax.new import limits\nfrom tlt_jax.far import off\n\n"
    rest = renamed.replace("from tlt_jax.new import limits\n", constant)
    rest, _, half = rest.partition("def _half")
    moved = code(
        tlt_jax__new__seat=rest.replace("_half(", "off._half("),
        tlt_jax__far__off="def _half" + half,
    )
    assert moved == first


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A thing.", "Other words.", True),
        ("def unused():\n    return 1", "def unused():\n    return 2", True),
        ("is too much", "is more than may be", True),
        ("def double(self) -> int:", "def double(self):\n        # Twice.", True),
        ("def double(self) -> int:", "def double(self):\n        print(1)", True),
        ("import numpy as np", "import numpy as other", False),
        ("* 4", "* 5", False),
        ("MOST / 2", "MOST / 3", False),
        ("> limits", ">= limits", False),
    ],
)
def test_what_the_package_computes_is_hashed(package, old, new, same):
    code, first = package
    assert PLACE.count(old) == 1
    assert (code(tlt_jax__old__place=PLACE.replace(old, new)) == first) == same


def test_constants_that_are_reached_are_hashed(package):
    code, first = package
    assert code(tlt_jax__old__limits="MOST = 10\nLEAST = 2\n") != first
    assert code(tlt_jax__old__limits="MOST = 10\nLEAST = 1\n") == first
    assert code(tlt_jax__old__limits="MOST = 11\nLEAST = 1\n") != first


def test_modules_named_in_strings_are_hashed(code):
    for name, text in (
        ("tlt_jax__program", "tlt_jax.program"),
        ("configs__small", "configs/small.py:variant"),
        ("experiments__peers__run_it", "run_it.py"),
    ):
        made = {"experiments__made": f"def main():\n    return {text!r}\n"}
        first = code(**made, **{name: "X = 1\n"})
        assert code(**{name: "X = 2\n"}) != first
        assert code(**{name: "# A comment.\nX = 1\n"}) == first


DECLARED = """
from experiments.lab import experiment

def measured(cell):
    return [{"value": 1}]

def plot(rows):
    return rows[0]

EXPERIMENT = experiment.Experiment(
    title="a title",
    options=(experiment.Option("steps", 3, "of a run"),),
    cells={"case": (1, 2)},
    measure=measured,
    plot=plot,
    claims={"what is claimed": lambda rows: (True, "")},
)
main = EXPERIMENT.main
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("a title", "another title", True),
        ("of a run", "of each run", True),
        ("rows[0]", "rows[1]", True),
        ("lambda rows: (True", "lambda rows: (False", True),
        ('"steps", 3', '"steps", 4', False),
        ("(1, 2)", "(1, 3)", False),
        ('"value": 1', '"value": 2', False),
    ],
)
def test_of_a_declaration_is_hashed_what_makes_the_table(code, old, new, same):
    first = code(experiments__made=DECLARED)
    assert DECLARED.count(old) == 1
    assert (code(experiments__made=DECLARED.replace(old, new)) == first) == same


def test_a_hash_does_not_depend_on_the_interpreter(code):
    text = 'def main(x: int, *, y=2):\n    return f"{x:>{y}} is {y}", [*range(x)]\n'
    assert code(experiments__made=text) == "aa19dddaef8f"


def test_every_name_that_is_taken_from_a_module_is_there():
    """Programs that only clusters or peers start would tell it late."""
    code = freshness.Code(freshness.ROOT, ("tlt_jax.viz",))
    missing = set()
    for path in freshness.FOLDER.rglob("*.py"):
        parts = path.relative_to(freshness.ROOT).with_suffix("").parts
        for hashed in code.reached([(".".join(parts), "")]):
            for name, wanted in filter(all, hashed.references):
                module = code.module(name)
                if module and wanted not in {*module.places, *module.imports}:
                    missing.add(f"{name}.{wanted}")
    assert missing == {"experiments.rollout_turns.__name__"}


def test_all_tables_of_record_are_hashed_quickly():
    """Whoever lists the experiments does not wait for it."""
    freshness.code.cache_clear()
    start = time.process_time()
    for path in freshness.FOLDER.glob("*.py"):
        freshness.source_hash(path.stem)
    assert time.process_time() - start < 6  # 1.6 s here


DRAWN = """
from experiments.parts import a
def plot(rows, path):
    rows.draw(path)
def main():
    rows = a.measure()
    out = a.folder()
    a.write(rows)
    plot(rows, out / "made.png")
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("rows.draw(path)", "rows.draw(path, color=1)", True),
        ('plot(rows, out / "made.png")', 'plotting.write(rows, plot, "made")', True),
        ("from experiments.parts", "import plotting\nfrom experiments.parts", True),
        ("    out = a.folder()\n", "", True),
        ("a.measure()", "a.measure(2)", False),
        ("a.write(rows)", "a.write(rows[1:])", False),
    ],
)
def test_drawing_is_not_hashed(code, old, new, same):
    first = code(experiments__made=DRAWN, experiments__parts__a="X = 1\n")
    assert DRAWN.count(old) == 1
    assert (code(experiments__made=DRAWN.replace(old, new)) == first) == same
