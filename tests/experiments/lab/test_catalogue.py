"""Listings, continued tables and claims tell the truth about their tables."""

import argparse
import json
import pathlib
import runpy

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


def test_the_source_hash_is_of_the_code_and_what_it_imports(tmp_path, monkeypatch):
    root = tmp_path / "experiments"
    (root / "parts").mkdir(parents=True)
    module, part = root / "made.py", root / "parts" / "a.py"
    module.write_text('"""Made."""\nfrom experiments.parts import a\n')
    part.write_text("X = 1\n")
    monkeypatch.setattr(freshness, "FOLDER", root)
    first = freshness.source_hash("made")
    module.write_text(
        '"""Other words."""\n# A comment.\nfrom experiments.parts import a\n'
    )
    assert freshness.source_hash("made") == first
    part.write_text("X = 2\n")
    changed = freshness.source_hash("made")
    assert changed != first
    results = tmp_path / "results"
    results.mkdir()
    assert freshness.status("made", results) == freshness.UNRUN
    (results / "made.csv").write_text("a\n1\n")
    assert freshness.status("made", results) == freshness.UNDATED
    (results / "made.json").write_text(json.dumps({"source_hash": changed}))
    assert freshness.status("made", results) == freshness.FRESH
    record = {"source_hash": changed, "cells": {"wanted": 3, "done": 2}}
    (results / "made.json").write_text(json.dumps(record))
    assert freshness.status("made", results) == freshness.PARTIAL
    part.write_text("X = 3\n")
    assert freshness.status("made", results) == freshness.STALE


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
def test_drawing_is_not_hashed(tmp_path, monkeypatch, old, new, same):
    root = tmp_path / "experiments"
    (root / "parts").mkdir(parents=True)
    (root / "parts" / "a.py").write_text("X = 1\n")
    monkeypatch.setattr(freshness, "FOLDER", root)
    path = root / "made.py"
    path.write_text(DRAWN)
    first = freshness.source_hash("made")
    assert DRAWN.count(old) == 1
    path.write_text(DRAWN.replace(old, new))
    assert (freshness.source_hash("made") == first) == same


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
