"""The experiment on checkpoints' stalls, run whole on a tiny drafter."""

import csv
import json

import pytest

from experiments import checkpoint_stall


def test_run(tmp_path):
    summary = checkpoint_stall.main(
        ["--targets=tiny", "--rounds=1", "--draft-vocab=16", f"--out={tmp_path}"]
    )
    modes = ["none", "blocking", "async", "selective"]
    assert sorted(row["system"] for row in summary) == sorted(modes)
    with open(tmp_path / "checkpoint_stall.csv", newline="") as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    assert rows["none"]["stall_ms"] == ""
    for mode in modes[1:]:
        row = {name: float(rows[mode][name]) for name in checkpoint_stall.METRICS}
        assert 0 < row["stall_ms"] < row["stall_and_step_ms"]
        assert row["stall_ms"] < row["complete_ms"]
    record = json.loads((tmp_path / "checkpoint_stall.json").read_text())
    assert list(record["settings"]["targets"]) == ["tiny"]
    assert (tmp_path / "checkpoint_stall.png").stat().st_size > 0


def test_unknown_target():
    with pytest.raises(ValueError, match="--targets names huge; known here are smoll"):
        checkpoint_stall.main(["--targets=huge"])
