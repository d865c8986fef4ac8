"""The trainer's cost for a rollout: what is started, and what is made of it."""

import json

import pytest

from experiments import trainer_makespan
from tlt_jax import metrics, timeline


def run(monkeypatch, tmp_path, digest_with="ab" * 32):
    """Lets a run be a record: 10 s of rollout, 10.5 s with the trainer."""
    commands = []

    def start(command):
        if "experiments.decode_beside" in command:
            (out,) = [a for a in command if a.startswith("--json=")]
            found = {"alone": 30.0, "computing": 31.0, "streaming": 50.0}
            with open(out.removeprefix("--json="), "w", encoding="utf-8") as file:
                json.dump(found, file)
            return
        commands.append(command)
        trains = "--config.adaptation.learning_rate=1e-30" in command
        row = dict.fromkeys(metrics.NAMES, 0.0) | {
            "step": 1,
            "time/rollout_s": 10.5 if trains else 10.0,
            "time/update_s": 6.0,
            "time/reward_s": 50.0,
            "rollout/tokens_digest": digest_with if trains else "ab" * 32,
            "workers/idle_s": 2.0,
            "workers/trained_s": 1.8 if trains else 0.0,
            "rollout/decode_s": 17.17 if trains else 16.0,
            "rollout/decode_steps": 404 if trains else 400,
        }
        # Two rollouts; in each the first worker is through sooner.
        waits = 0.1 if trains else 0.0
        busy = [[["busy", 0.0, 3.0], ["busy", 5.0, 7.0]], [["busy", 0.0, 4.0]]]
        busy[0].insert(1, ["training" if trains else "idle", 3.0, 4.0 + waits])
        busy[0].append(["idle", 7.0, 9.5 + waits])
        busy[1] += [["idle", 4.0, 4.0 + waits], ["busy", 5.0, 9.5]]
        busy[1].append(["idle", 9.5, 9.5 + waits])
        whole = [{"worker": i, "intervals": x} for i, x in enumerate(busy)]
        (workdir,) = [a for a in command if a.startswith("--workdir=")]
        path = f"{workdir.removeprefix('--workdir=')}/{metrics.FILE}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        path = f"{workdir.removeprefix('--workdir=')}/{timeline.FILE}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"step": 1, "workers": whole}) + "\n")

    monkeypatch.setattr(trainer_makespan.end_to_end, "start", start)
    options = ["--drafter=DIR", "--steps=1", "--set=seed=3", f"--out={tmp_path}"]
    return trainer_makespan.main(options), commands


def test_rollouts_with_and_without_the_trainer_are_compared(monkeypatch, tmp_path):
    summary, commands = run(monkeypatch, tmp_path)
    without, beside = summary
    assert beside["times_as_long"] == pytest.approx(1.05)
    assert without["times_as_long"] == 1.0 and without["trained_of_idle"] == 0.0
    assert beside["step_times_as_long"] == pytest.approx(16.5 / 16.0)
    assert beside["trained_of_idle"] == pytest.approx(0.9)
    # Half a second of ten: a tenth behind each rollout's end, and decoding.
    parts = {k: v for k, v in beside.items() if k.startswith("excess_")}
    assert parts["excess_waiting"] == pytest.approx(0.02)
    assert parts["excess_slower_steps"] == pytest.approx(1 / 16)
    assert parts["excess_further_steps"] == pytest.approx(0.01)
    assert sum(parts.values()) == pytest.approx(0.05)
    assert beside["step_ms"] == pytest.approx(42.5)
    assert beside["step_ms_alone"] == without["step_ms_alone"] == 30.0
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
