"""What updates are made of: algorithms, log-probabilities, groups with signal."""

import jax
import numpy as np
import pytest

from tests import tiny_runs
from tlt_jax import train
from tlt_jax.models.formats import source
from tlt_jax.rl.update import experience
from tlt_jax.runtime import failures
from tlt_jax.workdir import metrics, progress

policy, values = tiny_runs.policy, tiny_runs.values
settings, start = tiny_runs.settings, tiny_runs.start


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.initial_model(tmp_path_factory)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """A step that others are compared with; its groups carry signal."""
    directory = tmp_path_factory.mktemp("base") / "run"
    start(model, directory, num_steps=1)
    return directory


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(train.plots, "draw_all", lambda directory: None)


ALGORITHMS = {
    "dr_grpo": {"algorithm.name": "dr_grpo"},
    "gspo": {"algorithm.name": "gspo", "learner.epochs": 2},
    "rloo": {"algorithm.name": "rloo", "algorithm.kl_coef": 0.1},
    "reinforce_pp_baseline": {
        "algorithm.name": "reinforce_pp_baseline",
        "algorithm.kl_coef": 0.1,
    },
    "grpo with kl": {"algorithm.kl_coef": 0.1, "algorithm.kl_placement": "loss"},
    "grpo with kl as reward": {
        "algorithm.kl_coef": 0.1,
        "algorithm.kl_placement": "reward",
    },
    "minibatches": {
        "learner.epochs": 2,
        "learner.minibatches": 2,
        "algorithm.importance_cap": 2.0,
    },
}


@pytest.mark.parametrize("changes", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_every_algorithm_takes_steps(base, model, tmp_path, changes):
    rows = start(model, tmp_path, num_steps=2, **changes)
    first = metrics.read(base)[0]
    assert rows[0]["rollout/tokens_digest"] == first["rollout/tokens_digest"]
    for row in rows:
        assert row["policy/grad_norm"] > 0 and row["policy/update_skipped"] == 0
        assert row["mismatch/logprob_max_abs"] < 1e-4
    if "algorithm.kl_coef" in changes:
        # The initial policy is its own reference; after an update it is not.
        start_kl, later_kl = values(rows, "policy/kl")
        assert abs(start_kl) < 1e-5 < abs(later_kl)
        assert rows[0]["time/inference_s"] > 0
    if changes.get("learner.epochs", 1) > 1:
        assert rows[0]["policy/ratio_std"] > 1e-4
    initial, final = start_weights(model), policy(tmp_path)
    assert all(a != b for a, b in zip(initial, final, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "algorithm.kl_coef": 0.1,
            "learner.minibatches": 2,
        },
    ],
    ids=["one update", "two updates and a reference"],
)
def test_no_step_compiles_after_warm_up(model, tmp_path, changes):
    run = tiny_runs.config_of(**settings(model, num_steps=3, **changes))
    display = progress.Progress(run.num_steps, mode="off")
    with train.Trainer(run, tmp_path, display) as trainer:
        trainer.begin()
        trainer.warm_up()
        parts = trainer.parts
        pools = [parts.updater.pool, *(e.pool for e in parts.workers.engines)]
        compiled = [pool.stats.num_compiled for pool in pools]
        rows = [trainer.take_step() for _ in range(3)]
        assert [pool.stats.num_compiled for pool in pools] == compiled
    assert values(rows, "time/compile_s") == [0.0] * 3


def start_weights(model):
    params = source.resolve(model).load("float32")
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def test_old_logprobs_recorded_or_recomputed_are_the_same(model, tmp_path):
    rows = [
        start(
            model,
            tmp_path / choice,
            num_steps=1,
            **{"learner.epochs": 2, "learner.old_logprobs": choice},
        )[0]
        for choice in ("rollout", "recompute")
    ]
    for name in ("policy/loss", "policy/ratio_mean", "policy/grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3, abs=1e-5)


def test_weights_depend_on_tokens_and_on_no_recorded_logprob(
    model, tmp_path, monkeypatch
):
    """Those differ in last bits with the batches that a row was decoded in."""
    changes = {"num_steps": 1, "learner.epochs": 2}
    start(model, tmp_path / "run", **changes)
    recorded = experience.Experience.logprobs.fget
    rounded = property(lambda self: [x + np.float32(1e-5) for x in recorded(self)])
    monkeypatch.setattr(experience.Experience, "logprobs", rounded)
    start(model, tmp_path / "again", **changes)
    assert policy(tmp_path / "again") == policy(tmp_path / "run")
    # The change is one that would be seen.
    told = {"learner.old_logprobs": "rollout"}
    start(model, tmp_path / "recorded", **changes, **told)
    assert policy(tmp_path / "recorded") != policy(tmp_path / "run")


def test_dynamic_sampling_replaces_groups_without_signal(model, tmp_path):
    rows = start(model, tmp_path, num_steps=2, **{"algorithm.name": "dapo"})
    assert max(values(rows, "rollout/rounds")) > 1
    for row in rows:
        kept = tiny_runs.rollouts(tmp_path, row["step"])
        assert len(kept) == 16 * row["rollout/rounds"]
        assert row["policy/grad_norm"] > 0


def test_a_step_in_which_no_group_carries_signal_updates_nothing(model, tmp_path):
    rows = start(
        model,
        tmp_path,
        num_steps=2,
        **{"algorithm.name": "dapo", "reward.functions": ("tests.judges:constant",)},
    )
    for row in rows:
        assert metrics.NAMES <= row.keys()
        assert row["rollout/rounds"] == 4 and row["reward/zero_std_frac"] == 1.0
        assert row["policy/loss"] is None and row["time/update_s"] == 0.0
    assert policy(tmp_path) == start_weights(model)
    digests = values(rows, "rollout/tokens_digest")
    assert digests[0] != digests[1]  # The prompts go on.


def test_updates_that_are_not_finite_are_skipped_then_stop_the_run(
    model, tmp_path, monkeypatch
):
    """The advantages of steps 2 and 4 to 6 are not numbers."""
    advantages_of, num_calls = experience.advantages_of, 0

    def sometimes_nan(*arguments):
        nonlocal num_calls
        num_calls += 1
        estimated = advantages_of(*arguments)
        return estimated if num_calls in (1, 3) else np.full_like(estimated, np.nan)

    monkeypatch.setattr(experience, "advantages_of", sometimes_nan)
    keep = {"checkpoint.every": 1, "checkpoint.keep": 9}
    with pytest.raises(failures.TrainingError) as raised:
        start(model, tmp_path, **keep)
    assert "3 updates in a row were not finite (step 6)" in str(raised.value)
    assert "checkpoint is that of step 5;" in str(raised.value)
    rows = metrics.read(tmp_path)
    assert values(rows, "policy/update_skipped") == [0, 1, 0, 1, 1]
    assert np.isnan(rows[1]["policy/loss"])
    assert policy(tmp_path, 1) == policy(tmp_path, 2) != policy(tmp_path, 3)
    assert policy(tmp_path, 3) == policy(tmp_path, 5)


def test_bfloat16_trains(model, tmp_path):
    narrow = {"precision": "bfloat16", "rollout.max_batch": 1}
    rows = start(model, tmp_path, num_steps=2, **narrow)
    for row in rows:
        assert row["policy/grad_norm"] > 0 and row["policy/update_skipped"] == 0
        assert row["mismatch/logprob_max_abs"] < 0.1
