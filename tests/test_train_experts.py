"""Whole runs of a mixture of experts: no route flips, whatever guesses."""

import shutil

import numpy as np
import pytest

from tests import tiny_runs
from tlt_jax import train
from tlt_jax.workdir import metrics

values = tiny_runs.values
BASE = {
    "num_steps": 4,
    "pretrain.num_experts": 4,
    "pretrain.experts_per_token": 2,
    "pretrain.d_ff": 32,
    "learner.load_balancing_coef": 1e-2,
    "learner.router_z_coef": 1e-3,
    "drafter.features": "last",
    "adaptation.name": "eagle",
    "adaptation.row_tokens": 64,
    "adaptation.row_bases": 32,
    "specdec.tuner": "static",
    "specdec.strategies": ("4:D2K1V3",),
    "specdec.ngram_strategies": ("4:D3K2V5-ngram",),
}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(train.plots, "draw_all", lambda directory: None)


@pytest.fixture(scope="module")
def off(tmp_path_factory):
    directory = tmp_path_factory.mktemp("off") / "run"
    train.train(tiny_runs.config_of(**BASE), directory)
    return directory


def start(off, directory, **overrides):
    model = str(off / "initial_model")
    return tiny_runs.start(
        model, directory, **BASE | {"reward.functions": ()} | overrides
    )


def test_every_record_says_that_no_route_flipped(off):
    rows = metrics.read(off)
    assert tiny_runs.unknown_keys(rows) == []
    assert values(rows, "moe/route_flips") == [0.0] * 4
    assert all(1.5 < balance < 4 for balance in values(rows, "moe/load_balancing_loss"))
    assert min(values(rows, "moe/router_z_loss")) > 0
    assert max(values(rows, "mismatch/logprob_max_abs")) < 1e-4
    assert len(set(values(rows, "policy/weights_digest"))) == 4


def test_speculation_and_workers_change_nothing(off, tmp_path):
    changes = {"workers.num": 2, "mesh.data": 2, "rollout.max_batch": 2}
    rows = start(off, tmp_path, num_steps=3, **{"specdec.mode": "tlt"}, **changes)
    expected = metrics.read(off)[:3]
    for name in ("rollout/tokens_digest", "moe/route_flips"):
        assert values(rows, name) == values(expected, name), name
    # Learners of two devices add up otherwise.
    for name in ("moe/load_balancing_loss", "moe/router_z_loss", "policy/loss"):
        found, wanted = values(rows, name), values(expected, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert max(values(rows, "specdec/accept_length")) > 1


def test_a_run_that_was_stopped_goes_on_bit_for_bit(off, tmp_path):
    shutil.copytree(off, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name) > 2:
            shutil.rmtree(path)
    record = tmp_path / "run" / metrics.FILE
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))
    train.train(tiny_runs.config_of(**BASE), tmp_path / "run")
    found, expected = metrics.read(tmp_path / "run"), metrics.read(off)
    assert tiny_runs.decisive(found) == tiny_runs.decisive(expected)
    assert tiny_runs.policy(tmp_path / "run") == tiny_runs.policy(off)


def test_replayed_routes_never_flip_and_change_no_update_of_float32(off, tmp_path):
    rows = start(off, tmp_path, num_steps=2, **{"learner.routes": "replay"})
    expected = metrics.read(off)[:2]
    for name in ("rollout/tokens_digest", "policy/weights_digest", "moe/route_flips"):
        assert values(rows, name) == values(expected, name), name
