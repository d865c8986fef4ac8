"""Training a drafter on the target's features: objectives and one update."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec.training import losses as drafter_losses
from tlt_jax.specdec.training import unroll
from tlt_jax.types import Array

ObjectiveName = Literal["eagle", "hass", "eagle3"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a drafter learns.

    Attributes:
      num_steps: K, unrolled steps.
      decay: step k counts decay ** k.
      token_loss: see `drafter_losses.token_loss`.
      token_weight: of the token loss.
      feature_weight: of the SmoothL1 loss between the drafter's feature and the
        target's last one.
      detach: gradients end between steps.
    """

    num_steps: int
    decay: float = 1.0
    token_loss: drafter_losses.TokenLoss = "soft_ce"
    token_weight: float = 1.0
    feature_weight: float = 0.0
    detach: bool = False

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: unroll at least one step.")


def objective(name: ObjectiveName) -> Objective:
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


@struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      params: float32, `draft_ids` left out.
      opt_state: of the optimizer.
      num_updates: int32, steps taken; skipped ones are not counted.
    """

    params: drafter.DrafterParams
    opt_state: Any
    num_updates: Array


def draft_vocabulary(
    tokens: np.ndarray, size: int, vocab_size: int, always: Sequence[int] = ()
) -> np.ndarray:
    """Choose the tokens that a drafter can propose: the most frequent ones.

    Args:
      tokens: `[n] int32`, what the target wrote.
      size: Vd.
      vocab_size: V; tokens that are as frequent as others are taken by their id.
      always: ids that are taken whatever their frequency, such as EOS.

    Returns:
      `[Vd] int32`, rising.

    Raises:
      ValueError: `size` cannot hold `always`, or exceeds the vocabulary.
    """
    if not max(len(always), 1) <= size <= vocab_size:
        raise ValueError(
            f"draft_vocab_size={size} is not in [{max(len(always), 1)}, {vocab_size}]: "
            "it holds the tokens that end a text, and the vocabulary has no more."
        )
    counts = np.bincount(tokens, minlength=vocab_size)
    counts[list(always)] = counts.max() + 1
    chosen = np.argsort(-counts, kind="stable")[:size]
    return np.sort(chosen).astype(np.int32)


def loss(
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    *,
    cfg: unroll.ForwardConfig,
    objective: Objective,
) -> tuple[Array, dict[str, Array]]:
    """Compute the objective, each step's mean over the predictions that exist.

    Args:
      params: the drafter.
      batch: the rows.
      target: embedding and head.
      cfg: how.
      objective: what.

    Returns:
      The scalar and, for each step, `[K] float32`: `token_loss`, `feature_loss`,
      `top1_acc` (both laws' likeliest token agree), `top1_prob` (the target's
      probability of the drafter's likeliest token: how often a deterministic draft is
      accepted), `overlap`, and `count`, the predictions. Probabilities are those of the
      laws over the draft vocabulary.
    """
    seen = unroll.see(params, batch, target, cfg=cfg)
    num_bases = batch.bases.shape[1]
    sums = sums_of(
        params, seen, batch, target, 0, num_bases, cfg=cfg, objective=objective
    )
    return total_of(sums, batch, objective)


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
    """Sum losses and metrics over the predictions of some bases of each row.

    Those of all bases are the sums of any parts.

    Args:
      params, batch, target, cfg, objective: of `loss`.
      seen: of `unroll.see`.
      start, size: which bases.

    Returns:
      `[K] float32` by name, as `total_of` takes them.
    """
    num_steps = objective.num_steps
    wide = unroll.bases_from(batch, start, size + num_steps - 1)
    steps = unroll.unroll(
        params,
        unroll.bases_from(wide, 0, size),
        target,
        num_steps,
        cfg=cfg,
        detach=objective.detach,
        seen=seen,
    )
    exists = unroll.step_exists(wide, num_steps)[..., :size]
    ahead = jnp.minimum(wide.bases + 1, batch.tokens.shape[1] - 1)
    law_BMD = jnp.take_along_axis(batch.hidden, ahead[..., None], axis=1)
    law_BMD = law_BMD.astype(cfg.dtype)
    finished = tuple(drafter_head.for_head(params, cfg.drafter, x) for x in steps)
    chunk = min(cfg.head_chunk, law_BMD.shape[0] * law_BMD.shape[1])
    sums = _head_sums(
        objective.token_loss,
        chunk,
        (target.head, drafter_head.head_of(params, target.head)),
        unroll.predictions(finished, exists, law_BMD, chunk),
    )
    sums["feature_loss"] = jnp.zeros(num_steps)
    if objective.feature_weight:
        sums["feature_loss"] = _feature_sums(steps, exists, law_BMD)
    return sums


def total_of(
    sums: dict[str, Array], batch: unroll.Batch, objective: Objective
) -> tuple[Array, dict[str, Array]]:
    """Turn the sums over all bases into what `loss` returns; linear in them."""
    num_steps = objective.num_steps
    exists = unroll.step_exists(batch, num_steps)
    counts = jnp.sum(exists, axis=(1, 2), dtype=jnp.float32)
    means = {name: value / jnp.maximum(counts, 1) for name, value in sums.items()}
    per_step = (
        objective.token_weight * means["token_loss"]
        + objective.feature_weight * means["feature_loss"]
    )
    total = jnp.sum(objective.decay ** jnp.arange(num_steps) * per_step)
    return total, means | {"count": counts}


def step(
    state: TrainState,
    batch: unroll.Batch,
    target: unroll.Target,
    *,
    cfg: unroll.ForwardConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one optimizer step, unless loss or gradient is not finite.

    Args:
      state: before.
      batch: the rows.
      target: embedding and head.
      cfg, objective: how and what.
      optimizer: static.

    Returns:
      The state, bit for bit the old one where the step was skipped, and `loss`'s
      metrics with `loss`, `grad_norm` and `skipped` (0 or 1).
    """
    compute = functools.partial(loss, cfg=cfg, objective=objective)
    (value, metrics), grads = jax.value_and_grad(compute, has_aux=True)(
        state.params, batch, target
    )
    return apply(state, grads, value, metrics, optimizer)


def apply(
    state: TrainState,
    grads: drafter.DrafterParams,
    value: Array,
    metrics: dict[str, Array],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """Give the gradient to the optimizer; see `step` for what comes back."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    stepped = TrainState(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        num_updates=state.num_updates + 1,
    )
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    outcome = {"loss": value, "grad_norm": norm, "skipped": 1 - finite.astype(int)}
    return state, metrics | outcome


def _feature_sums(steps, exists, law_BMD):
    """Sum each step's feature loss over the predictions that exist, `[K]`."""
    law_DBM = jnp.moveaxis(law_BMD, -1, 0)
    width = law_DBM.shape[2] - len(steps) + 1
    sums = []
    for k, hidden in enumerate(steps):
        distance = drafter_losses.smooth_l1(law_DBM[..., k : k + width], hidden)
        sums.append(jnp.sum(jnp.where(exists[k], distance, 0.0)))
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
    sums, grads = _walk(token_loss, chunk, heads, predictions, with_grads=True)
    return sums, grads


def _head_sums_backward(token_loss, chunk, grads, slopes):
    # Step k's sum depends on step k's features alone.
    grads = slopes["token_loss"][:, None, None].astype(grads.dtype) * grads
    return None, unroll.Predictions(grads, None, None)


_head_sums.defvjp(_head_sums_forward, _head_sums_backward)


def _walk(token_loss, chunk, heads, predictions, with_grads):
    """Sums over all chunks, and gradients `[K, D, N]` of the summed token losses."""

    def one_chunk(sums, start):
        part = predictions.chunk(start, chunk)
        compute = functools.partial(_chunk_sums, token_loss, heads, part)
        grads = None
        if with_grads:
            grads, here = jax.grad(compute, has_aux=True)(part.hidden)
        else:
            _, here = compute(part.hidden)
        return jax.tree.map(jnp.add, sums, here), grads

    num_steps = predictions.hidden.shape[0]
    names = ("token_loss", "top1_acc", "top1_prob", "overlap")
    zeros = {name: jnp.zeros(num_steps, jnp.float32) for name in names}
    sums, grads = lax.scan(one_chunk, zeros, predictions.starts(chunk))
    if with_grads:
        grads = jnp.moveaxis(grads, 0, 2).reshape(predictions.hidden.shape)
    return sums, grads


def _chunk_sums(token_loss, heads, part, hidden):
    """Scalar sum of all token losses, and all sums `[K]`, of one chunk."""
    num_steps, _, size = hidden.shape
    target_logits = transformer.head_logits(heads[0], part.laws.T)
    sums = {name: [] for name in ("token_loss", "top1_acc", "top1_prob", "overlap")}
    for k in range(num_steps):
        law = target_logits[k : k + size]
        logits = transformer.head_logits(heads[1], hidden[k])
        probs, draft_probs = jax.nn.softmax(law), jax.nn.softmax(logits)
        best = jnp.argmax(logits, axis=-1)
        values = {
            "token_loss": drafter_losses.token_loss(token_loss, law, logits),
            "top1_acc": best == jnp.argmax(law, axis=-1),
            "top1_prob": jnp.take_along_axis(probs, best[:, None], axis=-1)[:, 0],
            "overlap": jnp.sum(jnp.minimum(probs, draft_probs), axis=-1),
        }
        for name, value in values.items():
            # What does not exist may be anything, but its gradient must be zero.
            sums[name].append(jnp.sum(part.exists[k] * value))
    sums = {name: jnp.stack(values) for name, values in sums.items()}
    total = jnp.sum(sums["token_loss"])
    return total, lax.stop_gradient(sums)
