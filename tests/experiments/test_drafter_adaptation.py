"""The adaptation experiment, run whole on a tiny model."""

import csv

import pytest

from experiments import drafter_adaptation


@pytest.mark.slow
def test_run(tmp_path, monkeypatch):
    monkeypatch.setitem(drafter_adaptation.SETTINGS, "rollout.prompts_per_step", 4)
    monkeypatch.setitem(drafter_adaptation.SETTINGS, "rollout.group_size", 4)
    monkeypatch.setitem(drafter_adaptation.SETTINGS, "rollout.max_batch", 2)
    monkeypatch.setitem(drafter_adaptation.SETTINGS, "mesh.fsdp", 1)
    monkeypatch.setitem(drafter_adaptation.SETTINGS, "adaptation.max_frac", 3.0)
    summary = drafter_adaptation.main(
        [
            *("--config=configs/tiny.py:arithmetic", "--steps=4", "--warm-steps=2"),
            f"--out={tmp_path}",
        ]
    )
    adapted, frozen = summary
    assert adapted["steps_differing"] == 0 and adapted["steps"] == 2
    with open(tmp_path / "drafter_adaptation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = [int(row["num_updates"]) for row in rows if row["system"] == "frozen"]
    # It learns while both do, and then no more.
    assert 0 < counts[1] == counts[2] == counts[3]
    assert adapted["num_updates"] > counts[1]
    assert (tmp_path / "drafter_adaptation.png").stat().st_size > 0
