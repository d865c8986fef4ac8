"""The experiment on packing, run whole on a tiny drafter."""

import csv

import pytest

from experiments import packing

TINY = (
    *("--target=tiny", "--draft-vocab=16", "--num-texts=24", "--median-response=12"),
    *("--row-tokens=192", "--num-rows=2", "--round-to=32", "--unroll=1"),
)


def test_run(tmp_path):
    summary = packing.main([*TINY, "--rounds=1", f"--out={tmp_path}"])
    assert sorted(row["system"] for row in summary) == sorted(packing.SYSTEMS)
    with open(tmp_path / "packing.csv", newline="") as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    # The same work in all layouts, on fewer columns where texts share rows.
    assert len({row["num_predictions"] for row in rows.values()}) == 1
    columns = [int(rows[name]["num_columns"]) for name in packing.SYSTEMS]
    assert columns == sorted(columns) and columns[0] < columns[2] == 24 * 192
    assert (tmp_path / "packing.png").stat().st_size > 0


def test_every_layout_holds_every_text_once():
    epochs = packing.Epochs(packing.EXPERIMENT.parse([*TINY]))
    lengths = sorted(epochs.texts.lengths.tolist())
    for layout in packing.SYSTEMS:
        found = []
        for batch in epochs.batches(layout):
            for row in batch.segment:
                found += [int((row == n).sum()) for n in range(row.max() + 1)]
        assert sorted(found) == lengths


def test_unknown_target():
    with pytest.raises(ValueError, match="--target names huge; known here are smoll"):
        packing.main(["--target=huge"])
