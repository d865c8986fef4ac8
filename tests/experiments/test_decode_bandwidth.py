"""Plain decoding against the memory's bandwidth, on a tiny model."""

import jax
import pytest

from experiments import decode_bandwidth
from experiments.lab import claims, tables

TINY = "--model=tiny --contexts=8,20 --temperatures=1 --steps=16 --page-size=16"


def test_run(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_bandwidth, "_LIMIT_BYTES", 2**20)
    # As a step takes too little here to be told from noise.
    monkeypatch.setattr(decode_bandwidth.Decoder, "measure", slope(1e-3))
    summary = decode_bandwidth.main([*TINY.split(), f"--out={tmp_path}", "--rounds=2"])
    rows = tables.read(tmp_path / "decode_bandwidth.csv")
    assert len(rows) == 4 and {row["step_ms"] for row in rows} == {1.0}
    for row in rows:
        reached = row["minimal_bytes"] / 1e-3 / row["limit_gb_per_s"] / 1e9
        assert row["bandwidth_frac"] == pytest.approx(reached)
        assert row["limit_gb_per_s"] > 0.1
    assert [row["context"] for row in summary] == [8, 20]
    assert decode_bandwidth.EXPERIMENT.redraw(tmp_path) == "drawn"
    (found,) = decode_bandwidth.EXPERIMENT.check_claims(tmp_path)
    assert found["verdict"] == claims.FAILS
    assert found["found"].startswith("tiny, float32, cpu: 0% at 8 cached, 0% at 20")


def slope(step_s):
    real = decode_bandwidth.Decoder.measure

    def measure(self):
        real(self)
        return step_s, 16 * step_s

    return measure


def test_a_token_needs_the_weights_once_and_its_context():
    cfg = decode_bandwidth.DESCRIBED["tiny"]
    options = decode_bandwidth.EXPERIMENT.parse(TINY.split())
    _, params = decode_bandwidth.load(options)
    head_dim, width, d_ff, vocab = 16, 32, 48, 64
    qkv, out = (width + 1) * 4 * head_dim, width * 2 * head_dim
    layer = qkv + out + 3 * width * d_ff + 2 * width
    weights = 2 * layer + width + vocab * width
    columns = 2 * 2 * head_dim
    needed = decode_bandwidth.minimal_bytes(cfg, params, 10)
    assert needed == 4 * (weights + 10 * columns)
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tied = params.replace(lm_head=None)
    cfg = decode_bandwidth.DESCRIBED["qwen2.5-1.5b"]
    assert decode_bandwidth.minimal_bytes(cfg, tied, 0) == leaves - 4 * vocab * width


def test_the_published_bandwidth_or_a_remedy():
    assert decode_bandwidth.limit_of("NVIDIA H200", "gpu", 0.0) == 4.8e12
    assert decode_bandwidth.limit_of("cpu", "cpu", 0.0) is None
    assert decode_bandwidth.limit_of("NVIDIA X", "gpu", 1e12) == 1e12
    with pytest.raises(ValueError, match="'NVIDIA X' is not known.*--bandwidth="):
        decode_bandwidth.limit_of("NVIDIA X", "gpu", 0.0)
