"""The end-to-end comparison: what it starts, and what it makes of two records."""

import json

import pytest

from experiments import end_to_end
from tlt_jax import metrics


def record(step, mode, rollout_s, **changes):
    values = dict.fromkeys(metrics.NAMES, 0.0) | {
        "step": step,
        "rollout/tokens_digest": f"digest {step}",
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

    monkeypatch.setattr(end_to_end, "start", commands.append)

    def write(mode, rows):
        (tmp_path / mode).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / mode / metrics.FILE).write_text(lines)

    return tmp_path, write, commands


def test_ratio_and_commands(workdirs):
    folder, write, commands = workdirs
    write("off", [record(i, "off", 20.0 if i > 1 else 99.0) for i in (1, 2, 3)])
    write("tlt", [record(i, "tlt", 4.0) for i in (1, 2, 3)])
    summary = end_to_end.main(
        [
            *("--steps=3", "--warm-steps=1", "--set=task.size=9"),
            *(f"--workdirs={folder}", f"--out={folder / 'out'}"),
        ]
    )
    for mode, command in zip(("tlt", "off"), commands, strict=True):
        assert command[1:3] == ["-m", "tlt_jax.main"]
        assert f"--config.specdec.mode={mode}" in command
        assert {"--config.num_steps=3", "--config.task.size=9"} <= set(command)
    ours, off = summary
    # (20 + 4) / (4 + 4), twice; judging and compiling do not count.
    assert ours["times_faster"] == off["seconds"] / ours["seconds"] == 3.0
    assert ours["rollout_times_faster"] == 5.0 and off["times_faster"] == 1.0
    assert ours["trained_of_idle"] == pytest.approx(0.9)
    assert ours["accept_length"] == 4.0 and ours["steps_differing"] == 0
    assert (folder / "out" / "end_to_end.png").stat().st_size > 0
    assert (folder / "out" / "end_to_end.json").is_file()


def test_a_run_that_differs_is_told(workdirs):
    folder, write, _ = workdirs
    write("off", [record(i, "off", 20.0) for i in (1, 2)])
    other = {"rollout/tokens_digest": "another"}
    write("tlt", [record(1, "tlt", 4.0), record(2, "tlt", 4.0, **other)])
    options = ["--steps=2", "--warm-steps=0", f"--workdirs={folder}"]
    ours, _ = end_to_end.main([*options, f"--out={folder / 'out'}"])
    assert ours["steps_differing"] == 1
