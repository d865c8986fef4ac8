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
            "--copy-mib=4",
        ]
    )
    assert [row["implementation"] for row in rows] == names.split(",")
    ours, *peers = rows
    assert ours["minimal_bytes"] == arg_specs.by_name("tree").minimal_bytes
    assert {"median_us", "gb_per_s", "bandwidth_frac"} <= ours.keys()
    # A share of what a copy reached in this run.
    record = json.loads((tmp_path / "verify_attention.json").read_text())
    share = ours["gb_per_s"] / record["copy_gb_per_s"]
    assert 0 < record["copy_gb_per_s"]
    assert ours["bandwidth_frac"] == pytest.approx(share, abs=0.02)
    # Of rows of different lengths jax's own know nothing.
    assert all(row["failed"].startswith("NotImplementedError") for row in peers)
    with (tmp_path / "verify_attention.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
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


def test_targets_are_told_reached_or_missed():
    def row(name, implementation, median_us, **more):
        named = dict(arguments=name, implementation=implementation)
        return named | dict(median_us=median_us, bandwidth_frac=None) | more

    slow = dict(arguments="decode_b1_8k", implementation="paged_attention", failed="no")
    rows = [
        row(bench.TARGET_ARGUMENTS, "triton_gpu", 120.0, bandwidth_frac=0.81),
        row(bench.TARGET_ARGUMENTS, "dot_product_attention_xla", 150.0),
        row(bench.TARGET_ARGUMENTS, "dot_product_attention_cudnn", 110.0),
        row("decode_b1_8k", "triton_gpu", 9.0),
        row("decode_b1_8k", "dot_product_attention_xla", 9.5),
        slow,
    ]
    assert bench.verdicts(rows) == [
        "reached: 80% of a copy's bandwidth on verify_b32_8k_w16 (81.0%)",
        "missed: jax's own speed on verify_b32_8k_w16 (120.0 us; "
        "dot_product_attention_cudnn 110.0 us)",
        "reached: jax's own speed on decode_b1_8k (9.0 us; "
        "dot_product_attention_xla 9.5 us)",
    ]
    # The reference is no kernel, and a row that failed says nothing.
    assert bench.verdicts([row("decode_b1_8k", "reference", 9.0), slow]) == []
