"""The trainer's cost for a rollout: what is started, and what is made of it."""

import json

import pytest

from experiments import trainer_makespan
from tlt_jax import metrics


def run(monkeypatch, tmp_path, digest_with="ab" * 32):
    """Lets a run be a record: 10 s of rollout, 10.5 s with the trainer."""
    commands = []

    def start(command):
        commands.append(command)
        trains = "--config.adaptation.learning_rate=1e-30" in command
        row = dict.fromkeys(metrics.NAMES, 0.0) | {
            "step": 1,
            "time/rollout_s": 10.5 if trains else 10.0,
            "rollout/tokens_digest": digest_with if trains else "ab" * 32,
            "workers/idle_s": 2.0,
            "workers/trained_s": 1.8 if trains else 0.0,
        }
        (workdir,) = [a for a in command if a.startswith("--workdir=")]
        path = f"{workdir.removeprefix('--workdir=')}/{metrics.FILE}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    monkeypatch.setattr(trainer_makespan.end_to_end, "start", start)
    options = ["--drafter=DIR", "--steps=1", "--set=seed=3", f"--out={tmp_path}"]
    return trainer_makespan.main(options), commands


def test_rollouts_with_and_without_the_trainer_are_compared(monkeypatch, tmp_path):
    summary, commands = run(monkeypatch, tmp_path)
    without, beside = summary
    assert beside["times_as_long"] == pytest.approx(1.05)
    assert without["times_as_long"] == 1.0 and without["trained_of_idle"] == 0.0
    assert beside["trained_of_idle"] == pytest.approx(0.9)
    # By turns, and otherwise alike.
    changed = [set(command) - set(commands[0]) for command in commands]
    order = ["--config.adaptation.enabled=false" in command for command in commands]
    assert order == [True, False, False, True]
    assert all("--config.seed=3" in command for command in commands)
    assert len(changed[1]) == 2  # the workdir and the rate
    drawn = tmp_path / "trainer_makespan.png"
    assert drawn.stat().st_size > 10_000


def test_runs_of_other_tokens_do_not_compare(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="drew different tokens"):
        run(monkeypatch, tmp_path, "cd" * 32)
