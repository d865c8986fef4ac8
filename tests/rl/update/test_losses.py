"""Losses against hand-worked values, a float64 loop over tokens, and their laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.rl.update import losses

LOG2 = float(np.log(2.0))


@pytest.fixture(params=["jit", "eager"])
def policy_loss(request):
    if request.param == "eager":
        return losses.policy_loss
    return jax.jit(losses.policy_loss, static_argnames=("cfg", "num_sequences"))


def widen(values, width=8):
    """Fills up to one width for all tests: eager operations then compile once."""
    values = np.asarray(values)
    values = values if values.dtype.kind in "bi" else values.astype(np.float32)
    return np.pad(values, (0, max(width - len(values), 0)))


def columns_of(advantages, **arrays):
    """Columns of one sequence with weight 1 unless said otherwise."""
    n = len(advantages)
    defaults = {
        "valid": np.ones(n, bool),
        "sequence_ids": np.zeros(n, np.int32),
        "weights": np.ones(n),
        "advantages": np.asarray(advantages),
    }
    return losses.TokenColumns(**{k: widen(v) for k, v in (defaults | arrays).items()})


def run(fn, ratios, advantages, cfg, num_sequences=2, entropy=None, **arrays):
    """The loss, its gradient and its sums where exp(logprobs - old) = ratios."""
    old = np.full(len(ratios), -1.0, np.float32)
    logprobs = widen(old + np.log(ratios))
    columns = columns_of(advantages, old_logprobs=old, **arrays)
    entropy = None if entropy is None else widen(entropy)
    (value, sums), grad = jax.value_and_grad(fn, has_aux=True)(
        logprobs, entropy, columns, cfg=cfg, num_sequences=num_sequences
    )
    return value, grad[: len(ratios)], sums


def test_clip_is_one_sided_and_higher_above(policy_loss):
    cfg = losses.LossConfig(clip_low=0.2, clip_high=0.28)
    # A > 0: bounded above only; A < 0: bounded below only.
    value, grad, sums = run(
        policy_loss, [1.25, 1.5, 0.5, 1.5, 0.5, 1.0], [1, 1, 1, -1, -1, 0], cfg
    )
    assert value == pytest.approx(-1.25 - 1.28 - 0.5 + 1.5 + 0.8, rel=1e-6)
    np.testing.assert_allclose(grad, [-1.25, 0, -0.5, 1.5, 0, 0], rtol=1e-6)
    assert sums["num_clipped"] == 2 and sums["num_tokens"] == 6
    record = losses.summarise(sums)
    assert record["policy/clip_frac"] == pytest.approx(1 / 3)
    assert record["policy/ratio_mean"] == pytest.approx(6.25 / 6)
    assert record["policy/ratio_std"] == pytest.approx(
        np.std([1.25, 1.5, 0.5, 1.5, 0.5, 1.0]), rel=1e-5
    )


def test_dual_clip_bounds_negative_advantages(policy_loss):
    cfg = losses.LossConfig(dual_clip=3.0)
    value, grad, sums = run(policy_loss, [5.0, 2.0, 5.0], [-1, -1, 1], cfg)
    assert value == pytest.approx(3.0 + 2.0 - 1.2, rel=1e-6)
    np.testing.assert_allclose(grad, [0, 2.0, 0], rtol=1e-6)
    assert losses.summarise(sums)["policy/dual_clip_frac"] == pytest.approx(1 / 3)


def test_gspo_ratio_is_the_geometric_mean(policy_loss):
    # Sequence 0: ratios 2 and 8, mean 4; sequence 1: one token, ratio 1/2.
    cfg = losses.LossConfig(ratio_level="sequence", clip_low=0.9, clip_high=9.0)
    value, grad, sums = run(
        policy_loss,
        [2.0, 8.0, 0.5],
        [1, 1, -1],
        cfg,
        sequence_ids=np.array([0, 0, 1], np.int32),
        weights=[0.25, 0.25, 0.5],  # the mean over two sequences of token means
    )
    assert value == pytest.approx(-(4.0 - 0.5) / 2, rel=1e-6)
    # d/dlogp_t of -s A / 2 is -s A / (2 len).
    np.testing.assert_allclose(grad, [-1.0, -1.0, 0.25], rtol=1e-6)
    assert losses.summarise(sums)["policy/ratio_mean"] == pytest.approx(8.5 / 3)


def test_gspo_clips_whole_sequences(policy_loss):
    cfg = losses.LossConfig(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4)
    value, grad, sums = run(
        policy_loss,
        [1.1, 1 / 1.1, 1.001, 1.001],
        [1, 1, 1, 1],
        cfg,
        sequence_ids=np.array([0, 0, 1, 1], np.int32),
    )
    # Token ratios far outside cancel in sequence 0; sequence 1 drifts beyond 1.0004.
    assert value == pytest.approx(-2 * 1.0 - 2 * 1.0004, rel=1e-6)
    np.testing.assert_allclose(grad, [-1, -1, 0, 0], rtol=1e-5)
    assert sums["num_clipped"] == 2


@pytest.mark.parametrize(
    "estimator, expected, slope",
    [
        # d = log 2: k1 = d, k2 = d^2 / 2, k3 = 1/2 - 1 + d.
        ("k1", 0.6931472, 1.0),
        ("k2", 0.2402265, 0.6931472),
        ("k3", 0.1931472, 0.5),
    ],
)
def test_kl_estimators(policy_loss, estimator, expected, slope):
    cfg = losses.LossConfig(kl_coef=0.1, kl_estimator=estimator)
    value, grad, sums = run(
        policy_loss, [1.0], [0], cfg, ref_logprobs=[-1.0 - LOG2], weights=[2.0]
    )
    assert value == pytest.approx(2 * 0.1 * expected, rel=1e-5)
    assert grad[0] == pytest.approx(2 * 0.1 * slope, rel=1e-5)
    assert losses.summarise(sums)["policy/kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator, low", [("k1", None), ("k2", 0), ("k3", 0)])
def test_kl_estimators_over_a_whole_law(estimator, low):
    own, ref = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    tokens = np.asarray(
        losses.token_kl(jnp.log(own), jnp.log(ref), estimator=estimator)
    )
    if low is not None:
        assert (tokens >= low).all()
    exact = (own * np.log(own / ref)).sum()
    bias = 0.05 if estimator == "k2" else 1e-6
    assert (own * tokens).sum() == pytest.approx(exact, abs=bias)


def test_kl_in_the_reward_is_measured_but_not_in_the_loss(policy_loss):
    cfg = losses.LossConfig(kl_coef=0.5, kl_estimator="k1", kl_placement="reward")
    value, grad, sums = run(policy_loss, [1.0], [0], cfg, ref_logprobs=[-2.0])
    assert value == 0 and grad[0] == 0 and sums["kl"] == 1.0
    shaped = losses.kl_as_reward(
        np.array([1.0, 0.0, 3.0]),
        [np.array([-1.0, -2.0]), np.array([-1.0]), np.array([])],
        [np.array([-1.5, -2.5]), np.array([-0.5]), np.array([])],
        cfg=cfg,
    )
    np.testing.assert_allclose(shaped, [0.5, 0.25, 3.0])


def test_kl_as_reward_leaves_out_tokens_without_support():
    cfg = losses.LossConfig(kl_coef=1.0, kl_estimator="k3", kl_placement="reward")
    shaped = losses.kl_as_reward(
        np.zeros(1),
        [np.array([-1.0, -np.inf, -1.0])],
        [np.array([-1.0 - LOG2, -1.0, -np.inf])],
        cfg=cfg,
    )
    np.testing.assert_allclose(shaped, [-0.1931472], rtol=1e-6)


def test_importance_is_truncated(policy_loss):
    cfg = losses.LossConfig(importance_cap=2.0)
    # Trainer over rollout: 1/2 and e, the latter capped at 2.
    value, grad, sums = run(
        policy_loss, [1.0, 1.0], [1, 1], cfg, rollout_logprobs=[-1.0 + LOG2, -2.0]
    )
    assert value == pytest.approx(-0.5 - 2.0, rel=1e-6)
    np.testing.assert_allclose(grad, [-0.5, -2.0], rtol=1e-6)
    record = losses.summarise(sums)
    assert record["policy/importance_mean"] == pytest.approx(1.25)
    assert record["policy/importance_capped_frac"] == 0.5


def test_the_decoupled_objective_clips_around_one_policy_and_weighs_by_another(
    policy_loss,
):
    """Token by token: probabilities of the policy, before its update, of the rollout.

    Reference: Hilton et al., "Batch size-invariance for policy optimization", equation
    of the decoupled clipped surrogate: `prox / behaviour x min(r A, clip(r) A)`.
    """
    now, prox, behaviour = np.array(
        [
            (0.44, 0.4, 0.32),  # ratio 1.1 stays, weight 1.25
            (0.6, 0.4, 0.32),  # ratio 1.5 is clipped to 1.2, weight 1.25
            (0.3, 0.4, 0.8),  # ratio 0.75, which A > 0 leaves, weight 0.5
            (0.3, 0.4, 0.8),  # the same with A = -1: clipped to 0.8
            (0.5, 0.4, 0.1),  # ratio 1.25 with A = -1 stays, weight 4 counts 2
        ]
    ).T
    advantages = np.array([1.0, 2.0, 1.0, -1.0, -1.0])
    ratio, weight = now / prox, np.minimum(prox / behaviour, 2.0)
    value, grad, sums = run(
        policy_loss,
        ratio,
        advantages,
        losses.LossConfig(importance_cap=2.0),
        # Those before the update are -1, whichever they are.
        rollout_logprobs=-1.0 + np.log(behaviour / prox),
    )
    per_token = [-1.1 * 1.25, -2 * 1.2 * 1.25, -0.75 * 0.5, 0.8 * 0.5, 1.25 * 2]
    assert value == pytest.approx(sum(per_token), rel=1e-6)
    np.testing.assert_allclose(grad, [-1.375, 0, -0.375, 0, 2.5], rtol=1e-5)
    twin = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    np.testing.assert_allclose(-weight * twin, per_token, rtol=1e-12)
    record = losses.summarise(sums)
    assert record["policy/clip_frac"] == pytest.approx(0.4)
    assert record["policy/importance_mean"] == pytest.approx(1.1)
    assert record["policy/importance_capped_frac"] == pytest.approx(0.2)


def test_entropy_bonus_is_weighted(policy_loss):
    cfg = losses.LossConfig(entropy_coef=0.01)
    value, _, sums = run(
        policy_loss,
        [1.0, 1.0],
        [0, 0],
        cfg,
        entropy=[2.0, 4.0],
        weights=[0.5, 0.25],
    )
    assert value == pytest.approx(-0.01 * 2.0, rel=1e-6)
    assert losses.summarise(sums)["policy/entropy"] == 3.0


def test_without_old_logprobs_the_ratio_is_one(policy_loss):
    (value, sums), grad = jax.value_and_grad(policy_loss, has_aux=True)(
        widen([-1.0, -2.0]),
        None,
        columns_of([1.0, -3.0]),
        cfg=losses.LossConfig(),
        num_sequences=2,
    )
    assert value == 2.0 and sums["ratio_less_one"] == 0
    np.testing.assert_array_equal(grad[:2], [-1.0, 3.0])


def random_case(seed, n=40, num_sequences=6):
    """Whole sequences with padding among the columns, and tokens without support."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, num_sequences, n)).astype(np.int32)
    per_sequence = rng.normal(size=num_sequences)
    sequence_weights = rng.uniform(0.1, 1.0, num_sequences)
    old = rng.uniform(-4, -0.1, n)
    logprobs = old + rng.normal(scale=0.4, size=n)
    logprobs[rng.random(n) < 0.1] = -np.inf
    old[rng.random(n) < 0.1] = -np.inf
    ref = old.copy()
    ref[np.isneginf(ref)] = -1.0
    ref += rng.normal(scale=0.4, size=n)
    ref[rng.random(n) < 0.1] = -np.inf
    columns = columns_of(
        per_sequence[ids],
        valid=rng.random(n) < 0.8,
        sequence_ids=ids,
        weights=sequence_weights[ids],
        old_logprobs=old,
        rollout_logprobs=rng.uniform(-4, -0.1, n),
        ref_logprobs=ref,
    )
    entropy = rng.uniform(0, 3, n).astype(np.float32)
    return logprobs.astype(np.float32), entropy, columns


def slow_loss(logprobs, entropy, columns, cfg, held=None):
    """The loss as a loop over tokens in float64.

    Where terms of a sequence's tokens differ otherwise than by the ratio, `held` are
    the log-probabilities at which the others' part of the sequence ratio is held.
    """
    c = jax.tree.map(lambda x: np.asarray(x, np.float64), columns)
    used = [
        t
        for t in range(len(logprobs))
        if c.valid[t] and min(logprobs[t], c.old_logprobs[t]) > -np.inf
    ]
    total = 0.0
    for t in used:
        ratio = np.exp(logprobs[t] - c.old_logprobs[t])
        if cfg.ratio_level == "sequence":
            own = [u for u in used if c.sequence_ids[u] == c.sequence_ids[t]]
            at = logprobs if held is None else held
            ratio = np.exp(np.mean([at[u] - c.old_logprobs[u] for u in own]))
            ratio *= np.exp(logprobs[t] - at[t])
        a = c.advantages[t]
        inside = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
        objective = min(ratio * a, inside * a)
        if cfg.dual_clip is not None and a < 0:
            objective = max(objective, cfg.dual_clip * a)
        if cfg.importance_cap is not None:
            mismatch = np.exp(c.old_logprobs[t] - c.rollout_logprobs[t])
            objective *= min(mismatch, cfg.importance_cap)
        cost = -objective - cfg.entropy_coef * entropy[t]
        if cfg.kl_placement == "loss" and c.ref_logprobs[t] > -np.inf:
            d = logprobs[t] - c.ref_logprobs[t]
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}
            cost += cfg.kl_coef * kl[cfg.kl_estimator]
        total += c.weights[t] * cost
    return total


CONFIGS = {
    "plain": losses.LossConfig(),
    "higher_k3": losses.LossConfig(clip_high=0.28, kl_coef=0.3),
    "dual_k2_entropy": losses.LossConfig(
        dual_clip=1.5, kl_coef=0.3, kl_estimator="k2", entropy_coef=0.1
    ),
    "sequence_k1": losses.LossConfig(
        ratio_level="sequence", clip_low=0.1, kl_coef=0.3, kl_estimator="k1"
    ),
    "sequence_truncated": losses.LossConfig(
        ratio_level="sequence", importance_cap=1.2, kl_placement="reward", kl_coef=0.3
    ),
    "token_truncated": losses.LossConfig(importance_cap=1.2, kl_coef=0.3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradient_of_the_slow_loss(name):
    cfg = CONFIGS[name]
    fn = jax.jit(
        jax.value_and_grad(losses.policy_loss, has_aux=True),
        static_argnames=("cfg", "num_sequences"),
    )
    for seed in range(4):
        logprobs, entropy, columns = random_case(seed)
        (value, _), grad = fn(logprobs, entropy, columns, cfg=cfg, num_sequences=6)
        exact = logprobs.astype(np.float64)
        held = exact if name == "sequence_truncated" else None

        def slow(x, entropy=entropy, columns=columns, held=held):
            return slow_loss(x, entropy, columns, cfg, held)

        assert value == pytest.approx(slow(exact), rel=1e-4, abs=1e-5)
        for t in range(len(exact)):
            slope = 0.0
            if np.isfinite(exact[t]):
                up, down = exact.copy(), exact.copy()
                up[t] += 1e-5
                down[t] -= 1e-5
                slope = (slow(up) - slow(down)) / 2e-5
            assert grad[t] == pytest.approx(slope, rel=2e-3, abs=1e-4), (seed, t)


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_add_up_to_the_batch(policy_loss, name):
    cfg = CONFIGS[name]
    logprobs, entropy, columns = random_case(7)
    whole = jax.value_and_grad(policy_loss, has_aux=True)(
        logprobs, entropy, columns, cfg=cfg, num_sequences=6
    )
    # Sequences stay whole; each part is filled up with columns that are not valid.
    parts = []
    for chosen in (columns.sequence_ids < 2, columns.sequence_ids >= 2):
        part = dataclasses.replace(columns, valid=columns.valid & chosen)
        parts.append(
            jax.value_and_grad(policy_loss, has_aux=True)(
                logprobs, entropy, part, cfg=cfg, num_sequences=6
            )
        )
    added = jax.tree.map(lambda x, y: x + y, *parts)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        added,
        whole,
    )
    for count in ("num_tokens", "num_clipped", "num_out_of_support"):
        assert added[0][1][count] == whole[0][1][count]
    assert whole[0][1]["num_tokens"] > 0 and whole[0][1]["num_out_of_support"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_without_support_leave_the_rest_alone(policy_loss, name):
    """Through a truncated softmax, as the trainer computes log-probabilities."""
    cfg = CONFIGS[name]
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    keep = np.ones((8, 5), bool)
    targets = np.array([0, 1, 2, 3, 4, 0, 0, 0])
    keep[2, targets[2]] = False  # the third token is outside the truncated law
    columns = columns_of(
        rng.normal(size=6),
        old_logprobs=[-1.0, -1.5, -1.2, -np.inf, -1.1, -0.9],
        rollout_logprobs=rng.uniform(-2, -1, 6),
        ref_logprobs=[-1.0, -np.inf, -1.0, -1.0, -1.0, -1.0],
    )

    def loss(x, columns):
        logprobs = jax.nn.log_softmax(jnp.where(keep, x, -jnp.inf))
        picked = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
        entropy = -jnp.where(keep, jnp.exp(logprobs) * logprobs, 0).sum(axis=1)
        entropy = jax.lax.stop_gradient(entropy)
        return policy_loss(picked, entropy, columns, cfg=cfg, num_sequences=2)

    (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(logits, columns)
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert all(np.isfinite(x) for x in sums.values())
    np.testing.assert_array_equal(grad[2:4], 0.0)
    record = losses.summarise(sums)
    assert record["policy/out_of_support_frac"] == pytest.approx(2 / 6)
    masked = dataclasses.replace(
        columns, valid=columns.valid & (np.arange(8) // 2 != 1)
    )
    (alone, _), alone_grad = jax.value_and_grad(loss, has_aux=True)(logits, masked)
    assert value == pytest.approx(float(alone), rel=1e-6)
    np.testing.assert_allclose(grad, alone_grad, rtol=1e-6)


def test_padding_is_never_read(policy_loss):
    logprobs, entropy, columns = random_case(1)
    cfg = losses.LossConfig(kl_coef=0.3, importance_cap=2.0, entropy_coef=0.1)

    def spoil(x, value):
        return np.where(columns.valid, x, value).astype(x.dtype)

    spoiled = dataclasses.replace(
        columns,
        sequence_ids=spoil(columns.sequence_ids, 10**6),
        **{
            name: spoil(getattr(columns, name), np.nan)
            for name in (
                "weights",
                "advantages",
                "old_logprobs",
                "rollout_logprobs",
                "ref_logprobs",
            )
        },
    )
    for level in ("token", "sequence"):
        fn = jax.value_and_grad(policy_loss, has_aux=True)
        cfg = dataclasses.replace(cfg, ratio_level=level)
        clean = fn(logprobs, entropy, columns, cfg=cfg, num_sequences=6)
        dirty = fn(
            spoil(logprobs, np.nan),
            spoil(entropy, np.nan),
            spoiled,
            cfg=cfg,
            num_sequences=6,
        )
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_nan_of_a_response_token_is_not_hidden(policy_loss):
    value, _, _ = run(policy_loss, [1.0, np.nan], [1, 1], losses.LossConfig())
    assert np.isnan(value)


def test_absurd_ratios_stay_finite(policy_loss):
    cfg = losses.LossConfig(kl_coef=0.1)
    columns = columns_of([-1.0], old_logprobs=[-200.0], ref_logprobs=[-1.0])
    for logprob in (-1.0, -500.0):
        (value, _), grad = jax.value_and_grad(policy_loss, has_aux=True)(
            widen([logprob]), None, columns, cfg=cfg, num_sequences=2
        )
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_a_batch_of_padding_is_zero(policy_loss):
    value, grad, sums = run(
        policy_loss, [1.5], [1], losses.LossConfig(), valid=np.zeros(1, bool)
    )
    assert value == 0 and grad[0] == 0
    record = losses.summarise(sums)
    assert record["policy/clip_frac"] == 0 and record["policy/out_of_support_frac"] == 0


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token_mean", [1 / 8, 1 / 8, 0]),
        ("sequence_mean", [1 / 4, 1 / 12, 0]),
        ("constant", [1 / 20, 1 / 20, 0]),
    ],
)
def test_token_weights(aggregation, expected):
    weights = losses.token_weights(np.array([2, 6, 0]), aggregation, max_length=10)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    empty = losses.token_weights(np.zeros(2, int), aggregation, max_length=10)
    np.testing.assert_array_equal(empty, [0, 0])


@pytest.mark.parametrize(
    "cfg, words",
    [
        (losses.LossConfig(kl_coef=0.1), "ref_logprobs=None but kl_coef=0.1"),
        (losses.LossConfig(importance_cap=2.0), "rollout_logprobs=None but importance"),
        (losses.LossConfig(entropy_coef=0.1), "entropy=None but entropy_coef=0.1"),
    ],
)
def test_missing_inputs_are_named(policy_loss, cfg, words):
    with pytest.raises(ValueError, match=words):
        policy_loss(jnp.zeros(8), None, columns_of([1.0]), cfg=cfg, num_sequences=2)
