"""Listings, continued tables and claims tell the truth about their tables."""

import argparse
import json
import pathlib
import runpy
import time

import pytest

from experiments import peers_side_by_side
from experiments.lab import (
    catalogue,
    cells,
    claims,
    freshness,
    harness,
    plotting,
    readme_tables,
)
from tests import command_lines

ROOT = pathlib.Path(__file__).resolve().parents[3]


def options(out, again=False):
    return argparse.Namespace(out=out, again=again, scale="cpu")


class Record:
    """Stands for a provenance."""

    def __init__(self, config_hash="c", source_hash="s"):
        self.record = {"config_hash": config_hash, "source_hash": source_hash}

    def write(self, path):
        path.write_text(json.dumps(self.record))


def measured(calls):
    def measure(cell):
        calls.append(cell.name)
        return [{"value": cell.overrides["x"] * 2.5, "told": None}]

    return measure


CELLS = [cells.Cell({"x": n}, seed=7) for n in (1, 2, 3)]


def test_finished_cells_are_skipped(tmp_path):
    calls = []
    with pytest.raises(RuntimeError, match="lights out"):
        cells.run(options(tmp_path), "e", Record(), CELLS, failing_at(2, calls))
    assert calls == ["x=1 seed=7", "x=2 seed=7"]
    told = json.loads((tmp_path / "e.json").read_text())
    assert told["cells"] == {"wanted": 3, "done": 1}
    rows = cells.run(options(tmp_path), "e", Record(), CELLS, measured(calls))
    assert calls[2:] == ["x=2 seed=7", "x=3 seed=7"]
    assert [row["value"] for row in rows] == [2.5, 5.0, 7.5]
    assert cells.read(tmp_path / "e.csv") == rows
    again = cells.run(
        options(tmp_path, again=True), "e", Record(), CELLS[:1], measured(calls)
    )
    assert len(calls) == 5 and len(again) == 1


def failing_at(x, calls):
    def measure(cell):
        calls.append(cell.name)
        if cell.overrides["x"] == x:
            raise RuntimeError("lights out")
        return [{"value": cell.overrides["x"] * 2.5, "told": None}]

    return measure


@pytest.mark.parametrize("other", [{"config_hash": "d"}, {"source_hash": "t"}])
def test_stale_rows_are_refused(tmp_path, other):
    cells.run(options(tmp_path), "e", Record(), CELLS, measured([]))
    with pytest.raises(ValueError, match="rows of other .*--again"):
        cells.run(options(tmp_path), "e", Record(**other), CELLS, measured([]))


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
    assert freshness.status("made", results) == freshness.UNRUN
    (results / "made.csv").write_text("a\n1\n")
    assert freshness.status("made", results) == freshness.UNDATED
    record = results / "made.json"
    record.write_text(json.dumps({"source_hash": changed}))
    assert freshness.status("made", results) == freshness.FRESH
    cut = {"source_hash": changed, "cells": {"wanted": 3, "done": 2}}
    record.write_text(json.dumps(cut))
    assert freshness.status("made", results) == freshness.PARTIAL
    record.write_text(json.dumps({"source_hash": changed}))
    code(experiments__parts__a="X = 3\n")
    assert freshness.status("made", results) == freshness.STALE


def test_a_carried_table_is_fresh_until_the_next_change(code, tmp_path):
    (tmp_path / "made.csv").write_text("a\n1\n")
    hashes = [code(experiments__made=f"X = {n}\n") for n in (1, 2, 3, 4)]
    record = tmp_path / "made.json"
    record.write_text(json.dumps({"source_hash": hashes[0]}))
    for number, why in ((2, "equal digests"), (3, "equal counts")):
        code(experiments__made=f"X = {number}\n")
        assert freshness.status("made", tmp_path) == freshness.STALE
        with pytest.raises(ValueError, match="carry needs --why"):
            freshness.carry("made", tmp_path, "abc", " ")
        told = freshness.carry("made", tmp_path, "abc", why)
        assert told == f"carried from {hashes[number - 2]} to {hashes[number - 1]}"
        assert freshness.status("made", tmp_path) == freshness.CARRIED
    assert freshness.carry("made", tmp_path, "abc", "again") == "needs no carrying"
    told = json.loads(record.read_text())
    assert told["source_hash"] == hashes[0]
    assert [step["why"] for step in told["carried"]] == [
        "equal digests",
        "equal counts",
    ]
    assert told["carried"][0]["commit"] == "abc"
    code(experiments__made="X = 4\n")
    assert freshness.status("made", tmp_path) == freshness.STALE
    # A chain with a link missing carries nothing.
    told["carried"] = told["carried"][1:]
    assert not freshness.is_current(told, hashes[2])
    with pytest.raises(ValueError, match=r"other.json tells no source_hash"):
        freshness.carry("other", tmp_path, "abc", "equal")


def test_a_carried_table_is_continued_and_stays_carried(tmp_path):
    cells.run(options(tmp_path), "e", Record(), CELLS[:1], measured([]))
    path = tmp_path / "e.json"
    step = {"from": "s", "to": "t", "commit": "abc", "why": "equal digests"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"carried": [step]}))
    now = Record(source_hash="t")
    rows = cells.run(options(tmp_path), "e", now, CELLS, measured([]))
    assert len(rows) == 3
    assert freshness.is_current(json.loads(path.read_text()), "t")
    with pytest.raises(ValueError, match="rows of other code"):
        cells.run(options(tmp_path), "e", Record(source_hash="u"), CELLS, measured([]))


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


def test_a_hash_does_not_depend_on_the_interpreter(code):
    text = 'def main(x: int, *, y=2):\n    return f"{x:>{y}} is {y}", [*range(x)]\n'
    assert code(experiments__made=text) == "f1387d3ea4b0"


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


def test_every_claim_names_an_experiment_and_reads_its_table():
    slugs = {item.slug for item in catalogue.ITEMS if item.exists}
    assert {claim.slug for claim in claims.CLAIMS} <= slugs
    folder = harness.RESULTS_DIR / "cpu"
    found = claims.check(folder)
    for claim, row in zip(claims.CLAIMS, found, strict=True):
        decided = row["verdict"] in (claims.HOLDS, claims.FAILS)
        assert decided == (folder / claim.file).exists(), row


def test_claims_are_decided_by_the_tables(tmp_path):
    (tmp_path / "end_to_end_summary.csv").write_text(
        "system,times_faster,trained_of_idle,steps_differing\ntlt,1.6,0.5,0\n"
    )
    found = {r["claim"]: r for r in claims.check(tmp_path)}
    on = "everything on is at least 1.5 times everything off on a CPU"
    assert found[on]["verdict"] == claims.HOLDS
    idle = "at least 80 % of the workers' idle time is used for training"
    assert found[idle]["verdict"] == claims.FAILS
    rest = [r for r in found.values() if r["experiment"] == "packing"]
    assert rest[0]["verdict"] == claims.NO_DATA
    (tmp_path / "packing_summary.csv").write_text("system\nlongest\n")
    told = {r["experiment"]: r for r in claims.check(tmp_path)}["packing"]
    assert told["verdict"] == claims.NO_DATA and "does not tell" in told["found"]


def test_a_table_of_the_readme_follows_its_csv(monkeypatch, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "t.csv").write_text("a,b\n1,0.25\n2,\n")
    monkeypatch.setattr(harness, "RESULTS_DIR", tmp_path)
    table = readme_tables.Table("t.csv", {"A": "a", "B": "b"})
    monkeypatch.setattr(readme_tables, "TABLES", {"mine": table})
    text = "x\n<!-- table: mine -->\nold\n<!-- end of table -->\ny\n"
    new = readme_tables.rendered(text)
    assert "| A | B |\n| --- | --- |\n| 1 | 0.25 |\n| 2 | - |\n" in new
    assert readme_tables.rendered(new) == new
    with pytest.raises(ValueError, match="'gone'; made here are mine"):
        readme_tables.rendered(text.replace("mine", "gone"))


def test_results_are_of_experiments_and_tell_where_they_come_from():
    for path in (harness.RESULTS_DIR / "cpu").glob("*.json"):
        record = json.loads(path.read_text())
        assert {"command", "settings", "config_hash", "versions"} <= record.keys(), path
        assert record["experiment"] == path.stem


def test_every_item_is_listed_at_every_scale_with_its_command():
    for scale in harness.SCALES:
        for item, row in zip(catalogue.ITEMS, catalogue.listing(scale), strict=True):
            command = row["command"]
            assert command.startswith(f"python -m experiments.{item.slug} ")
            if item.is_tool:
                continue
            if scale == "cpu" or not item.larger:
                assert "--scale=cpu" in command
                assert scale == "cpu" or row["status"] == catalogue.AS_CPU
            else:
                assert f"--scale={scale}" in command
                assert row["status"] != catalogue.AS_CPU


def test_listed_commands_start():
    """At the larger scales, too, where nobody has run them."""
    commands = {
        item.command(scale) for item in catalogue.ITEMS for scale in harness.SCALES
    }
    words = [command.split()[2:] for command in sorted(commands)]
    for command, found in zip(
        words, command_lines.start(words, stop=True), strict=True
    ):
        assert found.status == 0, (command, found.errors)


def test_recipes_of_the_larger_scales_are_there():
    parser = {"--config": lambda text: [text], "--models": lambda text: text.split(",")}
    for item in catalogue.ITEMS:
        for flags in item.larger.values():
            for flag in flags.split():
                name, _, value = flag.partition("=")
                for recipe in parser.get(name, lambda text: [])(value):
                    path, _, variant = recipe.rpartition("=")[2].partition(":")
                    made = runpy.run_path(str(ROOT / path))["get_config"]
                    made(*filter(None, [variant]))


def test_a_stamp_tells_scale_and_device():
    record = {"command": "python -m experiments.e --scale=one_gpu", "commit": "a" * 40}
    gpu = plotting.stamp(record | {"device": "1 x H100", "cpu_model": "Zen"})
    assert gpu == "scale one_gpu · 1 x H100 · aaaaaaaa"
    cpu = {"command": "python -m experiments.e", "device": "cpu", "cpu_model": "Zen"}
    assert plotting.stamp(cpu) == "scale cpu · Zen · no commit"


def test_peers_of_two_experiments_stand_side_by_side(tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    monkeypatch.setattr(harness, "RESULTS_DIR", tmp_path)
    with pytest.raises(ValueError, match="decode_speed_summary.csv is not in cpu"):
        peers_side_by_side.main([])
    write_peers_tables(tmp_path / "cpu")
    rows = peers_side_by_side.main([])
    assert [row["experiment"] for row in rows] == ["decode_speed", "grpo_step_speed"]
    assert rows[0]["case"] == "batch 1" and rows[1]["times_faster/min"] == 1.5
    assert (rows[0]["ours"], rows[0]["theirs"]) == (9, 4.5)
    assert (tmp_path / "cpu" / "peers_side_by_side.png").stat().st_size > 10_000


def test_peers_are_measured_in_one_run_each_where_it_belongs(tmp_path, monkeypatch):
    told = {}
    for name, module in peers_side_by_side.MEASURED.items():
        monkeypatch.setattr(
            module,
            "main",
            lambda flags, name=name, parse=module.parse_arguments: told.update(
                {name: parse(flags)}
            ),
        )
    write_peers_tables(tmp_path)
    rows = peers_side_by_side.main(
        [
            *(f"--out={tmp_path}", "--model-dir=DIR", "--rounds=2", "--step-rounds=1"),
            "--batches=8",
            *("--peers=vllm,trl,tunix", "--peer-python=trl=a,vllm=b"),
        ]
    )
    assert len(rows) == 2 and (tmp_path / "peers_side_by_side.csv").exists()
    decode, step = told["decode_speed"], told["grpo_step_speed"]
    assert (decode.peers, decode.peer_python, decode.batches) == ("vllm", "vllm=b", "8")
    assert (step.peers, step.peer_python) == ("trl,tunix", "trl=a")
    assert (decode.rounds, step.rounds, step.one_at_a_time) == (2, 1, True)
    assert decode.out == step.out == tmp_path
    record = json.loads((tmp_path / "peers_side_by_side.json").read_text())
    assert record["repeats"] == 2
    with pytest.raises(ValueError, match="--peers names verl; known here are"):
        peers_side_by_side.main([f"--out={tmp_path}", "--peers=verl"])


def write_peers_tables(folder):
    """Writes what the two experiments make, as far as they are read."""
    folder.mkdir(exist_ok=True)
    for slug, case, metric in (
        ("decode_speed", "batch", "tokens_per_s"),
        ("grpo_step_speed", "lengths", "steady_step_s"),
    ):
        names = [case, "temperature", "system", "rounds"]
        names += [f"{metric}/{what}" for what in ("median", "times", "times_min")]
        lines = [",".join(names), "1,0.0,tlt_jax,2,9.0,,", "1,0.0,peer,2,4.5,2.0,1.5"]
        lines.append("1,1.0,peer,2,3,3.0,3.0" if case == "batch" else "")
        (folder / f"{slug}_summary.csv").write_text("\n".join(lines))
        record = {"commit": slug, "config_hash": "c"}
        (folder / f"{slug}.json").write_text(json.dumps(record))
