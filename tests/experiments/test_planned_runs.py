"""Drafters trained by plan: adaptation, cadence, transfer; what they conclude."""

import pytest

from experiments import drafter_adaptation, drafter_cadence, transfer
from experiments.lab import recipes, tables
from tests import tiny_runs


@pytest.fixture
def runs(monkeypatch):
    """Records as runs would leave them: accept lengths follow the updates, and age."""
    asked = []

    def run(settings, trains):
        asked.append((settings, [trains(n) for n in range(settings.num_steps)]))
        rows, updates, newest = [], 0, 0
        for step in range(1, settings.num_steps + 1):
            age = settings.optimizer.learning_rate * (step - 1 - newest)
            if trains(step - 1):
                updates += settings.adaptation.max_steps
                newest = step
            rows.append(
                {
                    "step": step,
                    "specdec/accept_length": 1 + min(updates, 20) / 10 - 100 * age,
                    "rollout/tokens": 100,
                    "rollout/row_steps": 50,
                    "rollout/tokens_digest": f"{settings.seed}/{step}",
                    "drafter/num_updates": updates,
                    "reward/mean": 0.5,
                    "policy/loss": 0.1,
                    "policy_distance": 0.01 * step,
                }
            )
        return rows

    monkeypatch.setattr(recipes, "run_planned", run)
    return asked


def test_a_frozen_drafter_learns_no_more(tmp_path, runs):
    options = ["--steps=8", "--warm-steps=4", "--updates=3", "--seeds=1"]
    adapted, frozen = drafter_adaptation.main([*options, f"--out={tmp_path}"])
    assert adapted["num_updates"] == 24 and frozen["num_updates"] == 12
    assert adapted["steps"] == 4 and adapted["steps_differing"] == 0
    assert adapted["accept_length"] > frozen["accept_length"]
    rows = tables.read(tmp_path / "drafter_adaptation.csv")
    rows[-1]["tokens_digest"] = "another"
    assert drafter_adaptation.summary_of(rows, 4)[1]["steps_differing"] == 1
    path = tmp_path / "drafter_adaptation.png"
    path.unlink()
    assert drafter_adaptation.EXPERIMENT.redraw(tmp_path) == "drawn"
    assert path.stat().st_size > 10_000


def test_drafters_have_the_same_number_of_updates(tmp_path, runs):
    options = ["--steps=16", "--updates=96", "--seeds=1"]
    summary = drafter_cadence.main([*options, f"--out={tmp_path}"])
    assert {row["updates"] for row in summary} == {96}
    for settings, when in runs:
        assert settings.adaptation.max_steps * sum(when) == 96
    assert len(runs) == len(drafter_cadence.SYSTEMS) * len(drafter_cadence.DRIFTS)
    found = {(row["drift"], row["system"]): row for row in summary}
    ratio = "of_warm_up/last_quarter"
    assert found["large", "every step"][ratio] > 1
    assert found["large", drafter_cadence.WARM_UP][ratio] == 1
    assert found["small", "every step"]["steps_differing"] == 0
    assert (tmp_path / "drafter_cadence.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="--updates=10 in --steps=16 cannot be shared"):
        drafter_cadence.main([*options, "--updates=10"])


def test_cadences_are_what_they_are_called():
    def steps(system):
        return [n for n in range(32) if drafter_cadence.trains(system, n)]

    assert steps("every 8th") == [0, 8, 16, 24]
    assert steps("warm-up, then every 6th") == [0, 1, 2, 3, 8, 14, 20, 26]
    assert steps("one warm-up") == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_planned_run_counts_its_updates():
    overrides = {"num_steps": 3, "specdec.strategies": ("4:D2K1V3",)}
    overrides |= {"adaptation.row_tokens": 32, "adaptation.row_bases": 16}
    settings = recipes.planned_settings("tests/tiny_runs.py", overrides, 2)
    first = recipes.run_planned(settings, lambda number: number != 1)
    again = recipes.run_planned(settings, lambda number: number != 1)
    assert tiny_runs.values(first, "drafter/num_updates") == [2, 2, 4]
    distances = tiny_runs.values(first, "policy_distance")
    assert 0 < distances[0] < distances[-1]
    name = "specdec/accept_length"
    assert tiny_runs.values(first, name) == tiny_runs.values(again, name)


def test_transfer_is_told_against_start_and_own():
    lengths = {"start": (2.0, 2.0), "up": (4.0, 3.0), "down": (2.5, 5.0)}
    rows = [
        {
            "trained_on": trained_on,
            "measured_on": measured_on,
            "seed": 0,
            "accept_length": length,
            "tokens_digest": measured_on,
        }
        for trained_on, pair in lengths.items()
        for measured_on, length in zip(("up", "down"), pair, strict=True)
    ]
    rows[-1]["tokens_digest"] = "another"
    summary = transfer.summary_of(rows)
    found = {(row["trained_on"], row["measured_on"]): row for row in summary}
    assert found["up", "down"]["of_start"] == 1.5
    assert found["up", "down"]["of_own"] == 3 / 5
    assert found["down", "down"]["differing"] == 1


def test_questions_are_held_out_by_their_text(tmp_path, monkeypatch):
    monkeypatch.setitem(transfer.TEACHING, "pretrain.steps", 0)
    monkeypatch.setattr(transfer.World, "train", lambda self, name: tmp_path)
    options = transfer.EXPERIMENT.parse(["--texts=8", "--prompts=40"])
    world = transfer.World(options, tmp_path / "0", 0)
    for name, path in world.files.items():
        requests = world.requests(name)
        assert len(requests) == 40
        assert len({(r.prompt_id, r.sample) for r in requests}) == 40
        decode = world.policy.tokenizer.decode
        asked = {decode(request.prompt) for request in requests}
        known = path.read_text("utf-8")
        assert asked and not any(f'"{question}"' in known for question in asked)


@pytest.mark.slow
def test_transfer_of_real_drafters(tmp_path, monkeypatch):
    monkeypatch.setitem(transfer.TEACHING, "pretrain.steps", 20)
    options = ["--start-updates=2", "--updates=2", "--texts=8", "--prompts=8"]
    summary = transfer.main([*options, "--seeds=1", f"--out={tmp_path}"])
    assert len(summary) == len(transfer.TRAINED_ON) * len(transfer.TASKS)
    assert all(row["differing"] == 0 for row in summary)
    assert all(1 <= row["accept_length"] <= 7 for row in summary)
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
