"""The bench runs, and a failure is a row; nothing is asserted of speed."""

import csv
import json

import jax
import pytest

from tlt_jax.pallas_kernels.verify_attention import arg_specs, bench


def test_the_bench_writes_a_row_for_each(tmp_path):
    spec = arg_specs.by_name("decode")
    assert bench.cold(spec).num_layers == 64
    names = "reference,dot_product_attention_xla,paged_attention"
    rows = bench.main(
        [
            f"--out={tmp_path}",
            "--arguments=tree",
            f"--implementations={names}",
            "--calls=4",
        ]
    )
    assert [row["implementation"] for row in rows] == names.split(",")
    ours, *peers = rows
    assert ours["minimal_bytes"] == arg_specs.by_name("tree").minimal_bytes
    assert {"median_us", "gb_per_s", "bandwidth_frac"} <= ours.keys()
    # Of rows of different lengths jax's own know nothing.
    assert all(row["failed"].startswith("NotImplementedError") for row in peers)
    with (tmp_path / "verify_attention.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    record = json.loads((tmp_path / "verify_attention.json").read_text())
    assert record["device"] == jax.devices()[0].device_kind
    assert len(record["commit"]) == 40


def test_a_peer_attends_over_as_many_keys():
    spec = arg_specs.ArgSpec("equal", (16, 16), 3)
    row = bench.measure(spec, "dot_product_attention_xla", calls=4)
    assert "failed" not in row
    assert (
        "needs a TPU or GPU"
        in bench.measure(
            arg_specs.ArgSpec("one", (16,), 1, kind="causal"), "paged_attention"
        )["failed"]
    )


def test_without_an_accelerator_the_remedy_is_told(capsys):
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--implementations" in capsys.readouterr().err
