"""What a drafter learns from the target's features, summed over positions.

A position that drafting can start from is a base, and the drafter is unrolled from each
as if it drafted there (`unroll`). Every unrolled step is compared with the target's law
one position on. Sums over all bases are those of any parts of them, so that a training
step can be taken in pieces (`step`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import sampling
from tlt_jax.specdec.training import losses as drafter_losses
from tlt_jax.specdec.training import unroll
from tlt_jax.types import Array

ObjectiveName = Literal["eagle", "hass", "eagle3"]
# What is summed over predictions: what needs logits, and all of it.
HEAD_SUMS = "token_loss", "top1_acc", "top1_prob", "overlap"
SUMS = *HEAD_SUMS, "feature_loss"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a drafter learns.

    Attributes:
      num_steps: U, unrolled steps, or the places of a block.
      decay: step u counts decay ** u.
      token_loss: see `drafter_losses.token_loss`.
      token_weight: of the token loss.
      feature_weight: of the SmoothL1 loss between the drafter's feature and the
        target's last one.
      detach: gradients end between steps.
    """

    num_steps: int
    decay: float = 1.0
    token_loss: str = "soft_ce"
    token_weight: float = 1.0
    feature_weight: float = 0.0
    detach: bool = False

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: unroll at least one step.")


def preset(name: ObjectiveName) -> Objective:
    """Make a published objective.

    `eagle` regresses the target's next feature in one step; `hass` does so over several
    aligned steps, each on the features that the step before made; `eagle3` learns the
    law alone over seven steps and leaves its features free.

    References: Li et al., EAGLE, 2024, section 4.2; Zhang et al., HASS, 2024, section
    3.2 (without its top-k distillation term); Li et al., EAGLE-3, 2025, section 3.2.

    Raises:
      ValueError: there is no such objective.
    """
    match name:
        case "eagle":
            return Objective(1, token_weight=0.1, feature_weight=1.0)
        case "hass":
            return Objective(3, token_weight=0.1, feature_weight=1.0, detach=True)
        case "eagle3":
            return Objective(7, decay=0.8)
    raise ValueError(f"objective={name!r}: use eagle, hass or eagle3.")


def choose(
    name: ObjectiveName, overrides: Mapping[str, Any], block_size: int = 0
) -> Objective:
    """Make the objective that settings name, with fields of their own.

    A drafter that guesses blocks of K, `block_size`, has one objective, whatever the
    name: the law of every place of the block, the later ones less, compared by cross
    entropy and total variation (`lk_hybrid`); its steps are the K places.

    Raises:
      ValueError: there is no such objective.
    """
    if not block_size:
        return dataclasses.replace(preset(name), **overrides)
    own = Objective(block_size, decay=0.8, token_loss="lk_hybrid")
    kept = {key: value for key, value in overrides.items() if key != "num_steps"}
    return dataclasses.replace(own, **kept)


def sums_of(
    params: drafter.DrafterParams,
    seen: unroll.Seen,
    batch: unroll.Batch,
    target: unroll.Target,
    start: Array | int,
    size: int,
    *,
    cfg: unroll.ForwardConfig,
    objective: Objective,
) -> dict[str, Array]:
    """Sum losses and metrics over the predictions of `size` bases from `start` on.

    Returns `[U] float32` by name, one number for each unrolled step. See
    `unroll.unroll` for the arguments.
    """
    num_steps = objective.num_steps
    # Step u of a base is compared with the law of the base u places on, so that laws
    # are needed of a few bases behind the last one, too.
    wide = unroll.bases_from(batch, start, size + num_steps - 1)
    steps_DBM = unroll.unroll(
        params,
        unroll.bases_from(wide, 0, size),
        target,
        num_steps,
        cfg=cfg,
        detach=objective.detach,
        seen=seen,
    )
    exists_UBM = unroll.step_exists(wide, num_steps)[..., :size]
    # A feature at column t is the target's law of the token at t + 1; step 0 predicts
    # the law one column on, `[B, M + U - 1, D]`.
    ahead_BM = jnp.minimum(wide.bases + 1, batch.tokens.shape[1] - 1)
    law_BMD = jnp.take_along_axis(batch.hidden, ahead_BM[..., None], axis=1)
    law_BMD = law_BMD.astype(cfg.dtype)
    finished_DBM = [drafter_head.for_head(params, cfg.drafter, x) for x in steps_DBM]
    chunk = min(cfg.head_chunk, law_BMD.shape[0] * law_BMD.shape[1])
    sums = _head_sums(
        objective.token_loss,
        chunk,
        (target.head, drafter_head.head_of(params, target.head)),
        unroll.predictions(finished_DBM, exists_UBM, law_BMD, chunk),
    )
    sums["feature_loss"] = jnp.zeros(num_steps)
    if objective.feature_weight:
        sums["feature_loss"] = _feature_sums(steps_DBM, exists_UBM, law_BMD)
    return sums


def total_of(
    sums: dict[str, Array], batch: unroll.Batch, objective: Objective
) -> tuple[Array, dict[str, Array]]:
    """Turn `sums_of` all bases, or any parts of them, into the loss; linear in them.

    Returns:
      The scalar, each step's mean over the predictions that exist, weighted; and for
      each step, `[U] float32`: `token_loss`, `feature_loss`, `top1_acc` (both laws'
      likeliest token agree), `top1_prob` (the target's probability of the drafter's
      likeliest token: how often a deterministic draft is accepted), `overlap`, and
      `count`, the predictions. Probabilities are those of the laws over the draft
      vocabulary.
    """
    num_steps = objective.num_steps
    exists_UBM = unroll.step_exists(batch, num_steps)
    counts_U = jnp.sum(exists_UBM, axis=(1, 2), dtype=jnp.float32)
    means = {name: value / jnp.maximum(counts_U, 1) for name, value in sums.items()}
    per_step_U = (
        objective.token_weight * means["token_loss"]
        + objective.feature_weight * means["feature_loss"]
    )
    total = jnp.sum(objective.decay ** jnp.arange(num_steps) * per_step_U)
    return total, means | {"count": counts_U}


def _feature_sums(steps_DBM, exists_UBM, law_BMD):
    """Sum each step's feature loss over the predictions that exist, `[U]`."""
    law_DBM = jnp.moveaxis(law_BMD, -1, 0)
    width = law_DBM.shape[2] - len(steps_DBM) + 1
    sums = []
    for u, x_DBM in enumerate(steps_DBM):
        distance_BM = drafter_losses.smooth_l1(law_DBM[..., u : u + width], x_DBM)
        # Chosen and not multiplied: what does not exist may be infinite.
        sums.append(jnp.sum(jnp.where(exists_UBM[u], distance_BM, 0.0)))
    return jnp.stack(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_sums(token_loss, chunk, heads, predictions):
    """Sum what needs logits over all predictions, a chunk of bases at a time.

    A chunk's gradient is computed with its loss, so that logits are neither kept nor
    made twice; the target's are shared by all steps. Only features have a gradient: of
    the two heads, the target's and the drafter's, neither learns.
    """
    return _walk(token_loss, chunk, heads, predictions, with_grads=False)[0]


def _head_sums_forward(token_loss, chunk, heads, predictions):
    return _walk(token_loss, chunk, heads, predictions, with_grads=True)


def _head_sums_backward(token_loss, chunk, grads_UDQ, slopes):
    # Step u's sum depends on step u's features alone, so that the chain rule is one
    # factor for each step.
    slopes_U = slopes["token_loss"].astype(grads_UDQ.dtype)
    return None, unroll.Predictions(slopes_U[:, None, None] * grads_UDQ, None, None)


_head_sums.defvjp(_head_sums_forward, _head_sums_backward)


def _walk(token_loss, chunk, heads, predictions, with_grads):
    """Sums over all chunks, and gradients `[U, D, Q]` of the summed token losses."""

    def one_chunk(sums, start):
        part = predictions.chunk(start, chunk)
        compute = functools.partial(_chunk_sums, token_loss, heads, part)
        grads_UDQ = None
        if with_grads:
            grads_UDQ, here = jax.grad(compute, has_aux=True)(part.hidden)
        else:
            _, here = compute(part.hidden)
        return jax.tree.map(jnp.add, sums, here), grads_UDQ

    num_steps = predictions.hidden.shape[0]
    zeros = {name: jnp.zeros(num_steps, jnp.float32) for name in HEAD_SUMS}
    sums, grads = lax.scan(one_chunk, zeros, predictions.starts(chunk))
    if with_grads:
        # [chunks, U, D, chunk] end to end again.
        grads = jnp.moveaxis(grads, 0, 2).reshape(predictions.hidden.shape)
    return sums, grads


def _chunk_sums(token_loss, heads, part, hidden_UDQ):
    """Scalar sum of all token losses, and all sums `[U]`, of one chunk."""
    num_steps, _, size = hidden_UDQ.shape
    # Of all bases of the chunk and the few behind it once: step u looks at those from
    # the u-th on.
    target_logits_QV = transformer.head_logits(heads[0], part.laws.T)
    sums = {name: [] for name in HEAD_SUMS}
    for u in range(num_steps):
        law_QV = target_logits_QV[u : u + size]
        logits_QV = transformer.head_logits(heads[1], hidden_UDQ[u])
        target_probs, draft_probs = jax.nn.softmax(law_QV), jax.nn.softmax(logits_QV)
        best_Q = sampling.argmax(logits_QV)
        values = {
            "token_loss": drafter_losses.token_loss(token_loss, law_QV, logits_QV),
            "top1_acc": best_Q == sampling.argmax(law_QV),
            "top1_prob": jnp.take_along_axis(target_probs, best_Q[:, None], axis=-1)[
                :, 0
            ],
            "overlap": jnp.sum(jnp.minimum(target_probs, draft_probs), axis=-1),
        }
        for name, value_Q in values.items():
            # What does not exist may be anything, but its gradient must be zero.
            sums[name].append(jnp.sum(part.exists[u] * value_Q))
    sums = {name: jnp.stack(values) for name, values in sums.items()}
    total = jnp.sum(sums["token_loss"])
    return total, lax.stop_gradient(sums)
