"""Policy-gradient losses as weighted sums over token columns.

A loss is `sum_t weight_t * l_t`. The weights are made on the host from the whole batch
(`token_weights`), so the losses, the gradients and the metric sums of micro-batches add
up to those of the batch in one piece.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import types
from tlt_jax.runtime import external
from tlt_jax.settings import schema, sections

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 5e8: larger ratios are a broken batch, and their infinities would spread.
_MAX_LOG_RATIO = 20.0
_CLIPPED = "clipped"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What `policy_loss` computes.

    Attributes:
      surrogate: `clipped`, PPO's; or `package.module:name`, a function of one's own of
        ratio, advantages (`[N] float32`) and this record that returns what each token
        costs.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      dual_clip: where the advantage is negative the ratio counts at most this much;
        above 1 + clip_high, or None: no bound.
      ratio_level: `token`, or `sequence` for the sequence's geometric mean (GSPO).
      kl_coef: weight of the KL divergence from the reference; 0: none.
      kl_estimator: see `token_kl`. As a loss, k1 has zero mean gradient and only
        measures; as a reward all three act.
      kl_placement: `loss` adds it per token; `reward` leaves it to `kl_as_reward`.
      importance_cap: truncated importance sampling: each token's surrogate is scaled by
        min(trainer's old probability / rollout's probability, cap); None: off. Where
        older weights rolled out this is the decoupled objective, see
        `algorithms.LAGGING`.
      entropy_coef: weight of the entropy bonus; 0: none.
    """

    surrogate: str = _CLIPPED
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_level: Literal["token", "sequence"] = "token"
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_placement: Literal["loss", "reward"] = "loss"
    importance_cap: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self):
        schema.check_like(sections.Algorithm, self)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"dual_clip={self.dual_clip} must exceed 1 + clip_high = "
                f"{1 + self.clip_high}: it bounds ratios beyond the clip range; None "
                "turns it off."
            )


@flax.struct.dataclass
class TokenColumns:
    """What the loss knows of each predicted token besides the policy's forward.

    All are `[N]`; what stands where `valid` is False is never used.

    Attributes:
      valid: bool, the column is a response token.
      sequence_ids: int32, its sequence, in [0, num_sequences). A sequence lies whole
        within one micro-batch.
      weights: float32, from `token_weights`.
      advantages: float32.
      old_logprobs: float32, by the trainer before this batch's first update; None: the
        policy has not moved since, its ratio is 1.
      rollout_logprobs: float32, by the policy that rolled out, recorded or computed
        anew; only `importance_cap` needs them.
      ref_logprobs: float32, by the reference policy, or None.
    """

    valid: types.Array
    sequence_ids: types.Array
    weights: types.Array
    advantages: types.Array
    old_logprobs: types.Array | None = None
    rollout_logprobs: types.Array | None = None
    ref_logprobs: types.Array | None = None


def policy_loss(
    logprobs: types.Array,
    entropy: types.Array | None,
    columns: TokenColumns,
    *,
    cfg: LossConfig,
    num_sequences: int,
) -> tuple[types.Array, dict[str, types.Array]]:
    """Computes the clipped surrogate with its KL and entropy terms.

    With the ratio `r_t = exp(logprobs - old_logprobs)` and the advantage A, a token
    costs `-min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)`. For
    `ratio_level='sequence'` the ratio has the value of the sequence's geometric mean,
    `s = exp(mean_t(logprobs - old_logprobs))`, and the gradient of its own token:
    `s_t = sg[s] * p_t / sg[p_t]`.

    A token to which the trainer's truncated law (top-k, top-p) gives probability zero
    has no ratio: it adds nothing to value or gradient, is left out of sequence means
    and is counted as out of support. The reference's zeros leave out the KL term only.
    NaN is not hidden: it reaches the loss.

    Reference: Schulman et al., "Proximal Policy Optimization Algorithms", section 3;
    Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", dual-clip PPO; Zheng et al., "Group Sequence Policy Optimization",
    sections 4.1 and 4.3; Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", truncated importance sampling.

    Args:
      logprobs: `[N]` float32, the policy's, natural, differentiable.
      entropy: `[N]` float32, in nats, of the law that predicts the token; None where
        it is neither wanted in the loss nor in the metrics.
      columns: everything else, see `TokenColumns`.
      cfg: static.
      num_sequences: static bound on `sequence_ids`.

    Returns:
      The loss, a scalar, and sums for `summarise`: scalars that add over micro-batches,
      counts in int32.

    Raises:
      ValueError: `cfg` asks for KL, importance weights or entropy whose input is None.
    """
    _require(cfg, entropy, columns)
    chex.assert_rank(logprobs, 1)
    chex.assert_equal_shape([logprobs, *jax.tree.leaves((entropy, columns))])
    old_logprobs = columns.old_logprobs
    if old_logprobs is None:
        old_logprobs = jax.lax.stop_gradient(logprobs)

    outside = jnp.isneginf(logprobs) | jnp.isneginf(old_logprobs)
    used = columns.valid & ~outside
    # Replaced before any arithmetic: a mask applied after it would leave NaN gradients.
    logprobs = jnp.where(used, logprobs, 0.0)
    old_logprobs = jnp.where(used, old_logprobs, 0.0)
    weights = jnp.where(used, columns.weights, 0.0)
    advantages = jnp.where(used, columns.advantages, 0.0)

    log_ratio = logprobs - old_logprobs
    if cfg.ratio_level == "sequence":
        mean = _sequence_mean(log_ratio, used, columns.sequence_ids, num_sequences)
        own = logprobs - jax.lax.stop_gradient(logprobs)
        log_ratio = jax.lax.stop_gradient(mean) + own
    ratio = jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    surrogate, clipped, dual_clipped = _surrogate(ratio, advantages, cfg)

    sums = {
        "num_tokens": _count(used),
        "num_out_of_support": _count(columns.valid & outside),
        "num_clipped": _count(clipped),
        "num_dual_clipped": _count(dual_clipped),
        "ratio_less_one": jnp.where(used, ratio - 1, 0.0).sum(),
        "ratio_less_one_squared": jnp.where(used, (ratio - 1) ** 2, 0.0).sum(),
    }
    if cfg.importance_cap is not None:
        rollout_logprobs = jnp.where(used, columns.rollout_logprobs, 0.0)
        importance = jnp.exp(
            jnp.minimum(old_logprobs - rollout_logprobs, _MAX_LOG_RATIO)
        )
        capped = jnp.minimum(importance, cfg.importance_cap)
        surrogate = surrogate * jax.lax.stop_gradient(capped)
        sums["importance"] = jnp.where(used, capped, 0.0).sum()
        sums["num_importance_capped"] = _count(used & (importance > capped))
    per_token = surrogate
    if columns.ref_logprobs is not None:
        with_ref = used & ~jnp.isneginf(columns.ref_logprobs)
        kl = token_kl(
            jnp.where(with_ref, logprobs, 0.0),
            jnp.where(with_ref, columns.ref_logprobs, 0.0),
            estimator=cfg.kl_estimator,
        )
        sums["kl"] = kl.sum()
        sums["num_kl_tokens"] = _count(with_ref)
        if cfg.kl_placement == "loss":
            per_token = per_token + cfg.kl_coef * kl
    if entropy is not None:
        entropy = jnp.where(used, entropy, 0.0)
        sums["entropy"] = entropy.sum()
        per_token = per_token - cfg.entropy_coef * entropy
    loss = (weights * per_token).sum()
    return loss, jax.tree.map(jax.lax.stop_gradient, sums | {"loss": loss})


def summarise(sums: Mapping[str, Any]) -> dict[str, float]:
    """Turns metric sums, added over all micro-batches, into records.

    They are those of `policy_loss`, scalars of host or device.

    Returns:
      `policy/loss`, `policy/clip_frac`, `policy/dual_clip_frac`, `policy/ratio_mean`,
      `policy/ratio_std` and `policy/out_of_support_frac`; `policy/entropy`,
      `policy/kl`, `policy/importance_mean` and `policy/importance_capped_frac` where
      they were computed. Means are over tokens, unweighted. Without tokens they are 0.
    """
    values = {name: float(value) for name, value in sums.items()}
    tokens = max(values["num_tokens"], 1.0)
    mean_less_one = values["ratio_less_one"] / tokens
    variance = values["ratio_less_one_squared"] / tokens - mean_less_one**2
    num_valid = values["num_tokens"] + values["num_out_of_support"]
    record = {
        "policy/loss": values["loss"],
        "policy/clip_frac": values["num_clipped"] / tokens,
        "policy/dual_clip_frac": values["num_dual_clipped"] / tokens,
        "policy/ratio_mean": 1.0 + mean_less_one,
        "policy/ratio_std": math.sqrt(max(variance, 0.0)),
        "policy/out_of_support_frac": values["num_out_of_support"] / max(num_valid, 1),
    }
    if "entropy" in values:
        record["policy/entropy"] = values["entropy"] / tokens
    if "kl" in values:
        record["policy/kl"] = values["kl"] / max(values["num_kl_tokens"], 1.0)
    if "importance" in values:
        record["policy/importance_mean"] = values["importance"] / tokens
        record["policy/importance_capped_frac"] = (
            values["num_importance_capped"] / tokens
        )
    return record


def token_kl(
    logprobs: types.Array,
    ref_logprobs: types.Array,
    *,
    estimator: KlEstimator,
    xp: Any = jnp,
) -> types.Array:
    """Estimates the policy's KL divergence from the reference at sampled tokens.

    With `d = logprobs - ref_logprobs`: k1 is `d` (unbiased, of either sign), k2 is
    `d**2 / 2` (biased, low variance, its gradient is the divergence's), k3 is
    `exp(-d) - 1 + d` (unbiased, never negative, low variance).

    Reference: Schulman, "Approximating KL Divergence", 2020.

    Args:
      logprobs: `[...]` float, the policy's, natural.
      ref_logprobs: `[...]` float, the reference's.
      estimator: `k1`, `k2` or `k3`.
      xp: what computes: jax.numpy, or numpy on the host.

    Returns:
      `[...]` float, in nats.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    bounded = xp.clip(-difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return xp.expm1(bounded) + difference


def kl_as_reward(
    rewards: np.ndarray,
    logprobs: Sequence[np.ndarray],
    ref_logprobs: Sequence[np.ndarray],
    *,
    cfg: LossConfig,
) -> np.ndarray:
    """Subtracts each response's summed KL estimate from its reward, on the host.

    `reward_i - kl_coef * sum_t kl_t`, before advantages are computed. Tokens outside
    the support of either law (log-probability -inf) are left out, as in `policy_loss`.

    Args:
      rewards: `[n]` float, one per response.
      logprobs: n arrays, one `[length_i]` per response: the policy that sampled.
      ref_logprobs: n arrays of the same lengths: the reference.
      cfg: gives `kl_coef` and `kl_estimator`.

    Returns:
      `[n] float64`.
    """
    shaped = np.array(rewards, np.float64)
    for i, (own, ref) in enumerate(zip(logprobs, ref_logprobs, strict=True)):
        own, ref = np.asarray(own, np.float64), np.asarray(ref, np.float64)
        used = ~(np.isneginf(own) | np.isneginf(ref))
        kl = token_kl(own[used], ref[used], estimator=cfg.kl_estimator, xp=np)
        shaped[i] -= cfg.kl_coef * kl.sum()
    return shaped


def token_weights(
    lengths: np.ndarray, aggregation: Aggregation, *, max_length: int
) -> np.ndarray:
    """Computes the weight that every token of a sequence has in the batch's loss.

    With n sequences of lengths `l_i` that are not empty:

    | aggregation | weight of a token of sequence i | used by |
    | --- | --- | --- |
    | token_mean | `1 / sum_j l_j` | DAPO |
    | sequence_mean | `1 / (n l_i)` | GRPO, GSPO |
    | constant | `1 / (n max_length)` | Dr.GRPO, RLOO |

    An empty sequence is a dropped response: it has weight 0 and is not counted in n.

    Args:
      lengths: `[n]` int >= 0, predicted tokens of each sequence of the whole batch.
      aggregation: see the table.
      max_length: the length limit in tokens, at least 1; only `constant` reads it.

    Returns:
      `[n] float32`.
    """
    present = lengths > 0
    num_sequences = max(int(present.sum()), 1)
    if aggregation == "constant":
        weight = np.full(lengths.shape, 1.0 / (num_sequences * max_length))
    elif aggregation == "sequence_mean":
        weight = 1.0 / (num_sequences * np.maximum(lengths, 1))
    else:
        weight = np.full(lengths.shape, 1.0 / max(int(lengths.sum()), 1))
    return np.where(present, weight, 0.0).astype(np.float32)


def _require(
    cfg: LossConfig, entropy: types.Array | None, columns: TokenColumns
) -> None:
    """Refuses a configuration whose input is not there."""
    missing = []
    if cfg.kl_coef and cfg.kl_placement == "loss" and columns.ref_logprobs is None:
        missing.append(("kl_coef", "ref_logprobs"))
    if cfg.importance_cap is not None and columns.rollout_logprobs is None:
        missing.append(("importance_cap", "rollout_logprobs"))
    if cfg.entropy_coef and entropy is None:
        missing.append(("entropy_coef", "entropy"))
    for setting, name in missing:
        raise ValueError(
            f"{name}=None but {setting}={getattr(cfg, setting)} needs it: compute "
            f"{name} or turn {setting} off."
        )


def _surrogate(
    ratio: types.Array, advantages: types.Array, cfg: LossConfig
) -> tuple[types.Array, types.Array, types.Array]:
    """Returns what each token costs, and where each of the two clips acted."""
    if cfg.surrogate != _CLIPPED:
        nowhere = jnp.zeros(ratio.shape, bool)
        cost = external.load("surrogate", cfg.surrogate)(ratio, advantages, cfg)
        return cost, nowhere, nowhere
    high, low = 1 + cfg.clip_high, 1 - cfg.clip_low
    above = (advantages > 0) & (ratio > high)
    below = (advantages < 0) & (ratio < low)
    kept = jnp.where(above, high, jnp.where(below, low, ratio))
    dual = jnp.zeros_like(above)
    if cfg.dual_clip is not None:
        dual = (advantages < 0) & (ratio > cfg.dual_clip)
        kept = jnp.where(dual, cfg.dual_clip, kept)
    return -kept * advantages, above | below, dual


def _sequence_mean(
    values: types.Array,
    used: types.Array,
    sequence_ids: types.Array,
    num_sequences: int,
) -> types.Array:
    """Gives every column the mean of `values` over its sequence's used columns."""
    ids = jnp.where(used, sequence_ids, 0)
    total = jax.ops.segment_sum(jnp.where(used, values, 0.0), ids, num_sequences)
    num = jax.ops.segment_sum(used.astype(values.dtype), ids, num_sequences)
    return (total / jnp.maximum(num, 1))[ids]


def _count(condition: types.Array) -> types.Array:
    return condition.sum(dtype=jnp.int32)
