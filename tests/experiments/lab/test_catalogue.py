"""Listings and claims tell the truth about their tables."""

import ast
import json
import pathlib
import re
import runpy
import subprocess

import pytest

from experiments import __main__ as program
from experiments import peers_side_by_side
from experiments.lab import (
    catalogue,
    claims,
    experiment,
    freshness,
    pages,
    provenance,
    result_tables,
    tables,
)
from tests import command_lines

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_every_claim_names_an_experiment_and_reads_its_table():
    folder = experiment.RESULTS_DIR / "cpu"
    found = catalogue.check(folder)
    assert len(found) == sum(len(item.claims) for item in catalogue.every()) > 30
    for row in found:
        slug = row["experiment"]
        table = tables.path_of(folder, slug, "summary")
        if catalogue.declared(slug).summary is None:
            table = tables.path_of(folder, slug)
        decided = row["verdict"] in (claims.HOLDS, claims.FAILS)
        assert decided == table.exists(), row


def test_claims_are_decided_by_the_tables(tmp_path):
    (tmp_path / "end_to_end_summary.csv").write_text(
        "system,times_faster,trained_of_idle,steps_differing\ntlt,1.6,0.5,0\n"
    )
    found = {r["claim"]: r for r in catalogue.check(tmp_path)}
    on = "everything on is at least 1.5 times everything off on a CPU"
    assert found[on]["verdict"] == claims.HOLDS
    idle = "at least 80 % of the workers' idle time is used for training"
    assert found[idle]["verdict"] == claims.FAILS
    rest = [r for r in found.values() if r["experiment"] == "packing"]
    assert rest[0]["verdict"] == claims.NO_DATA
    (tmp_path / "packing_summary.csv").write_text("system\nlongest\n")
    told = {r["experiment"]: r for r in catalogue.check(tmp_path)}["packing"]
    assert told["verdict"] == claims.NO_DATA and "does not tell" in told["found"]


def test_a_table_of_the_readme_follows_its_csv(monkeypatch, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "t.csv").write_text("a,b\n1,0.25\n2,\n")
    monkeypatch.setattr(experiment, "RESULTS_DIR", tmp_path)
    table = result_tables.Table("t.csv", {"A": "a", "B": "b"})
    monkeypatch.setattr(result_tables, "TABLES", {"mine": table})
    text = "x\n<!-- table: mine -->\nold\n<!-- end of table -->\ny\n"
    new = pages.rendered(text)
    assert "| A | B |\n| --- | --- |\n| 1 | 0.25 |\n| 2 | - |\n" in new
    assert pages.rendered(new) == new
    with pytest.raises(ValueError, match="'gone'; made here are mine"):
        pages.rendered(text.replace("mine", "gone"))


def test_results_are_of_experiments_and_tell_where_they_come_from():
    for path in (experiment.RESULTS_DIR / "cpu").glob("*.json"):
        record = json.loads(path.read_text())
        assert {"command", "settings", "config_hash", "versions"} <= record.keys(), path
        assert record["experiment"] == path.stem


def test_every_item_is_listed_at_every_scale_with_its_command():
    for scale in experiment.SCALES:
        for item, row in zip(catalogue.every(), catalogue.listing(scale), strict=True):
            command = row["command"]
            assert command.startswith(f"python -m experiments.{item.slug} ")
            if item.is_tool:
                continue
            if scale == "cpu" or not item.larger:
                assert "--scale=cpu" in command
                assert scale == "cpu" or row["status"] == experiment.AS_CPU
            else:
                assert f"--scale={scale}" in command
                assert row["status"] != experiment.AS_CPU


def test_listed_commands_start():
    """At the larger scales, too, where nobody has run them."""
    commands = {
        item.command(scale) for item in catalogue.every() for scale in experiment.SCALES
    }
    commands |= {command for item in catalogue.every() for command in item.before}
    words = [command.split()[2:] for command in sorted(commands)]
    for command, found in zip(
        words, command_lines.start(words, stop=True), strict=True
    ):
        assert found.status == 0, (command, found.errors)


def test_recipes_of_the_larger_scales_are_there():
    parser = {"--config": lambda text: [text], "--models": lambda text: text.split(",")}
    for item in catalogue.every():
        for flags in item.larger.values():
            for flag in flags.split():
                name, _, value = flag.partition("=")
                for recipe in parser.get(name, lambda text: [])(value):
                    path, _, variant = recipe.rpartition("=")[2].partition(":")
                    made = runpy.run_path(str(ROOT / path))["get_config"]
                    made(*filter(None, [variant]))


def test_peers_of_two_experiments_stand_side_by_side(tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    monkeypatch.setattr(experiment, "RESULTS_DIR", tmp_path)
    with pytest.raises(ValueError, match="decode_speed_summary.csv is not in cpu"):
        peers_side_by_side.main([])
    write_peers_tables(tmp_path / "cpu", cpu_model="theirs")
    of_record = sorted(path.name for path in (tmp_path / "cpu").iterdir())
    rows = peers_side_by_side.main([])
    assert [row["experiment"] for row in rows] == ["decode_speed", "grpo_step_speed"]
    assert rows[0]["case"] == "batch 1" and rows[1]["times_faster/min"] == 1.5
    assert (rows[0]["ours"], rows[0]["theirs"]) == (9, 4.5)
    assert sorted(path.name for path in (tmp_path / "cpu").iterdir()) == of_record
    own = tmp_path / "mine" / "cpu"
    assert (own / "peers_side_by_side.png").stat().st_size > 10_000
    # Its figures are of other tables, and so is what the picture says.
    stamp = "scale cpu · theirs · decode_s, grpo_ste"
    record = provenance.read(own, "peers_side_by_side")
    assert provenance.stamp(record, is_read=True) == stamp
    # One's own tables go before those of record.
    write_peers_tables(own, slugs=("decode_speed",), cpu_model="mine")
    peers_side_by_side.main([])
    record = provenance.read(own, "peers_side_by_side")
    two = "scale cpu · 2 machines: mine · decode_s; theirs · grpo_ste"
    assert provenance.stamp(record, is_read=True) == two


def test_peers_are_measured_in_one_run_each_where_it_belongs(tmp_path, monkeypatch):
    told = {}
    for name, module in peers_side_by_side.MEASURED.items():
        monkeypatch.setattr(
            module,
            "main",
            lambda flags, name=name, parse=module.EXPERIMENT.parse: told.update(
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


def write_peers_tables(folder, slugs=tuple(peers_side_by_side.METRICS), **machine):
    """Writes what the two experiments make, as far as they are read."""
    folder.mkdir(exist_ok=True)
    for slug, case, metric in (
        ("decode_speed", "batch", "tokens_per_s"),
        ("grpo_step_speed", "lengths", "steady_step_s"),
    ):
        if slug not in slugs:
            continue
        names = [case, "temperature", "system", "rounds"]
        names += [f"{metric}/{what}" for what in ("median", "times", "times_min")]
        lines = [",".join(names), "1,0.0,tlt_jax,2,9.0,,", "1,0.0,peer,2,4.5,2.0,1.5"]
        lines.append("1,1.0,peer,2,3,3.0,3.0" if case == "batch" else "")
        (folder / f"{slug}_summary.csv").write_text("\n".join(lines))
        record = {"experiment": slug, "commit": slug, "config_hash": "c"}
        record |= {"device": "cpu", "cpu_model": "x", "uncommitted_changes": False}
        (folder / f"{slug}.json").write_text(json.dumps(record | machine))


def test_every_declaration_is_in_the_catalogue():
    declaring = {
        path.stem
        for path in freshness.FOLDER.glob("*.py")
        if "\nEXPERIMENT = " in path.read_text("utf-8")
    }
    assert declaring == {*catalogue.PAPER, *catalogue.OURS}
    assert [item.slug for item in catalogue.every()] == [
        *catalogue.PAPER,
        *catalogue.OURS,
    ]


def test_the_listing_names_every_experiment(capsys):
    folder = freshness.FOLDER
    runnable = {
        path.stem
        for path in folder.glob("*.py")
        if f"python -m experiments.{path.stem}" in (_docstring(path) or "")
    }
    rows = program.main([])
    assert {row["experiment"] for row in rows if row["command"]} == runnable
    told = capsys.readouterr().out
    assert "decode_speed" in told and "\nStale: the code that it measures" in told
    unrun = program.main(["--scale=paper"])
    assert {row["status"] for row in unrun} == {"unrun", "as cpu", "a tool"}
    told = capsys.readouterr().out
    assert all(len(line) <= 100 for line in told.splitlines())
    # Nobody has run that: no word needs explaining.
    assert "Stale:" not in told


def test_the_listing_says_what_an_item_is_of_and_takes():
    rows = {row["experiment"]: row for row in catalogue.listing("cpu")}
    assert rows["length_tail"]["paper"] == "figures 1 and 2"
    assert all(rows[slug]["paper"] for slug in catalogue.PAPER)
    speed = rows["speculation_speed"]
    assert speed["takes"] == (
        "20 min on 2 cores (AMD EPYC), and 15 min for what comes first"
    )
    assert program.entry(speed)[-3:] == [
        "  $ python -m tlt_jax.train_drafter "
        "--config=configs/smollm2_drafter.py:counting \\",
        "        --workdir=workdirs/counting_drafter",
        "  $ python -m experiments.speculation_speed --scale=cpu "
        "--drafter=workdirs/counting_drafter",
    ]
    large = {row["experiment"]: row for row in catalogue.listing("paper")}
    assert large["end_to_end"]["takes"].startswith("8 to 64 H100; never run")
    assert large["cluster_size"]["takes"] == rows["cluster_size"]["takes"]


def test_pictures_are_drawn_of_ones_own_tables_unless_told(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULTS_DIR", tmp_path)
    drawn = []
    monkeypatch.setattr(
        experiment.Experiment,
        "redraw",
        lambda self, folder: drawn.append(folder / self.slug) or "drawn",
    )
    for folder, name in (("cpu", "packing"), ("mine/cpu", "devices")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.json").write_text('{"commit": "c"}')
    program.main(["plots"])
    program.main(["plots", f"--out={tmp_path / 'cpu'}"])
    assert drawn == [tmp_path / "mine/cpu/devices", tmp_path / "cpu/packing"]
    with pytest.raises(ValueError, match="has no tables: run an experiment first"):
        program.main(["plots", f"--out={tmp_path / 'empty'}"])


def test_pictures_of_record_are_as_wide_as_a_page_and_shown():
    page = (freshness.FOLDER / "RESULTS.md").read_text("utf-8")
    for path in (experiment.RESULTS_DIR / "cpu").glob("*.png"):
        with path.open("rb") as picture:
            width = int.from_bytes(picture.read(20)[16:])
        # Timelines are wider: they are copies of what runs draw.
        assert width <= (1110 if "timeline" in path.name else 1000), path
        assert f"(results/cpu/{path.name})" in page


def test_what_the_page_of_results_links_is_there():
    page = (freshness.FOLDER / "RESULTS.md").read_text("utf-8")
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page):
        path, _, anchor = link.partition("#")
        assert (freshness.FOLDER / path).exists(), link
        assert anchor in anchors or not anchor, link


def _docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_every_table_of_compilers_is_made_by_one_command(monkeypatch, tmp_path):
    started, states = [], iter([provenance.STALE] * 2 + [provenance.PARTIAL] * 2)

    def run(command, check):
        started.append(command[2:-1])
        return subprocess.CompletedProcess(command, int("kernel" in command[2]))

    monkeypatch.setattr(program.subprocess, "run", run)
    monkeypatch.setattr(
        experiment.Experiment, "status_in", lambda item, folder: next(states)
    )
    monkeypatch.setattr(catalogue, "COMPILED", catalogue.COMPILED[::2])
    asked = ["compile", f"--out={tmp_path}"]
    assert len(program.main(asked)) == len(program.main(asked)) == 2
    # Of other code: one looks at each row by itself, of the other all are measured.
    recipes, steps = "experiments.ahead_of_time", "experiments.step_ahead_of_time"
    assert started == [
        *([recipes], [steps, "--compiled=1,64", "--again"]),
        *([recipes], [steps, "--compiled=1,64"]),
    ]
    monkeypatch.setattr(catalogue, "COMPILED", (("kernel_ahead_of_time",),))
    states = iter([provenance.UNRUN])
    with pytest.raises(ValueError, match="kernel_ahead_of_time ended with status 1"):
        program.main(["compile"])


def test_the_flags_of_what_compilers_make_can_be_read():
    made = {slug for slug, *_ in catalogue.COMPILED}
    assert made == {item.slug for item in catalogue.every() if "ahead_of" in item.slug}
    for slug, *flags in catalogue.COMPILED:
        catalogue.declared(slug).parse(flags)
