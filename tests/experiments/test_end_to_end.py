"""The end-to-end comparison: what it starts, and what it makes of the records."""

import json

import pytest

from experiments import end_to_end
from experiments.lab import tables
from tlt_jax.workdir import metrics

TINY = "--models=tiny=tests/tiny_runs.py"


def record(step, mode, rollout_s, **changes):
    values = dict.fromkeys(metrics.NAMES, 0.0) | {
        "step": step,
        "rollout/tokens_digest": f"digest {step}",
        "policy/weights_digest": f"weights {step}",
        "specdec/accept_length": 1.0 if mode == "off" else 4.0,
        "specdec/accept_rate_by_depth": [],
        "specdec/strategy": "none",
        "time/rollout_s": rollout_s,
        "time/update_s": 4.0,
        "time/reward_s": 100.0,
        "time/compile_s": 100.0,
        "workers/idle_s": 5.0,
        "workers/trained_s": 0.0 if mode == "off" else 4.5,
        "length/max": 60,
    }
    return values | changes


@pytest.fixture
def workdirs(tmp_path, monkeypatch):
    """Lets a run be two records that were there before."""
    commands = []

    monkeypatch.setattr(end_to_end.recipes, "start", commands.append)

    def write(name, rows):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / metrics.FILE).write_text(lines)

    return tmp_path, write, commands


def test_ratio_and_commands(workdirs):
    folder, write, commands = workdirs
    write(
        "smollm2_off_0", [record(i, "off", 20.0 if i > 1 else 99.0) for i in (1, 2, 3)]
    )
    write("smollm2_tlt_0", [record(i, "tlt", 4.0) for i in (1, 2, 3)])
    summary = end_to_end.main(
        [
            *("--steps=3", "--warm-steps=1", "--set=task.size=9"),
            *(f"--workdirs={folder}", f"--out={folder / 'out'}"),
        ]
    )
    for mode, command in zip(("tlt", "off"), commands, strict=True):
        assert command[1:3] == ["-m", "tlt_jax.main"]
        assert "--config=configs/smollm2_tlt.py" in command
        assert f"--config.specdec.mode={mode}" in command
        wanted = {"--config.num_steps=3", "--config.task.size=9", "--config.seed=0"}
        assert wanted <= set(command)
    ours, off = summary
    # (20 + 4) / (4 + 4), twice; judging and compiling do not count.
    assert ours["times_faster"] == off["seconds"] / ours["seconds"] == 3.0
    assert ours["rollout_times_faster"] == 5.0 and off["times_faster"] == 1.0
    assert ours["trained_of_idle"] == pytest.approx(0.9)
    assert ours["accept_length"] == 4.0 and ours["steps_differing"] == 0
    assert (folder / "out" / "end_to_end.json").is_file()
    drawn = folder / "out" / "end_to_end.png"
    assert drawn.stat().st_size > 10_000
    drawn.unlink()
    assert end_to_end.EXPERIMENT.redraw(folder / "out") == "drawn"
    assert drawn.stat().st_size > 10_000


def test_workers_are_divided_among_processes(workdirs):
    folder, write, commands = workdirs
    write("tiny_off_0", [record(1, "off", 20.0)])
    options = [TINY, "--systems=off", "--steps=1", "--warm-steps=0"]
    options += ["--set=workers.num=4", "--processes=2", f"--workdirs={folder}"]
    (summary,) = end_to_end.main([*options, f"--out={folder / 'out'}"])
    (command,) = commands
    assert command[1:4] == ["-m", "tlt_jax.launch", "--processes=2"]
    assert "--module=tlt_jax.main" in command
    assert command.count("--config.workers.num=2") == 1
    assert "--config.workers.num=4" not in command
    assert summary["processes"] == 2


@pytest.mark.parametrize("name", ["rollout/tokens_digest", "policy/weights_digest"])
def test_a_run_that_differs_is_told(workdirs, name):
    folder, write, _ = workdirs
    write("tiny_off_0", [record(i, "off", 20.0) for i in (1, 2)])
    other = {name: "another"}
    write("tiny_tlt_0", [record(1, "tlt", 4.0), record(2, "tlt", 4.0, **other)])
    options = [TINY, "--steps=2", "--warm-steps=0", f"--workdirs={folder}"]
    ours, _ = end_to_end.main([*options, f"--out={folder / 'out'}"])
    assert ours["steps_differing"] == 1


def test_systems_over_models_are_added_to_the_table(workdirs):
    folder, write, commands = workdirs
    for model in ("tiny", "count"):
        for system, rollout_s in (("off", 8.0), ("ngram", 6.0), ("frozen", 4.0)):
            write(f"{model}_{system}_0", [record(1, system, rollout_s)])
    options = [
        *(f"{TINY},count=configs/tiny.py:count", "--steps=1", "--warm-steps=0"),
        *(f"--workdirs={folder}", f"--out={folder / 'out'}"),
        "--set=tiny:drafter.directory=/a/b,count:drafter.directory=c",
    ]
    end_to_end.main([*options, "--systems=off,ngram"])
    summary = end_to_end.main([*options, "--systems=off,ngram,frozen"])
    # Finished runs are not started again.
    assert len(commands) == 6
    found = {(row["model"], row["system"]): row["times_faster"] for row in summary}
    assert found["tiny", "ngram"] == 12 / 10 and found["count", "frozen"] == 12 / 8
    frozen, counted = commands[-2], commands[-1]
    assert "--config.adaptation.enabled=false" in frozen
    assert "--config.drafter.directory=/a/b" in frozen
    assert "--config.drafter.directory=c" in counted
    names = [row["cell"] for row in tables.read(folder / "out" / "end_to_end.csv")]
    assert sum("drafter.directory=PATH" in name for name in names) == 3


def test_matches_are_named_where_a_recipe_names_none(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from tests import tiny_runs\n"
        "def get_config(arg=''):\n"
        "    config = tiny_runs.get_config()\n"
        "    config.specdec.ngram_strategies = ()\n"
        "    return config\n"
    )
    model = end_to_end.Model("mine", str(recipe), {})
    given = "specdec.ngram_strategies"
    assert model.settings("ngram")[given] == f"4:{end_to_end.MATCHES}"
    assert given not in model.settings("tlt")
    with pytest.raises(ValueError, match="--set=mine:drafter.directory=DIR"):
        model.settings("frozen")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--systems=off,gone", "names gone; known are off, ngram"),
        ("--set=gone:seed=1", "'gone'; --models has tiny"),
        ("--processes=2", "2 processes of .* must divide workers.num=1"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        end_to_end.main([TINY, option, f"--out={tmp_path}"])
