"""The policy's log-probabilities on packed rows, and the gradient of its loss."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from tlt_jax.models import attention, experts, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.rl.update import losses, packing
from tlt_jax.rl.update import routing as routing_lib
from tlt_jax.specdec import sampling
from tlt_jax.types import Array


@struct.dataclass
class Rows:
    """Packed rows as the forward reads them, see `packing.Packed`.

    Attributes:
      tokens, positions, segment, prefix: `[B, T] int32`.
      source, target: `[B, M] int32`.
      routes: `[B, T, L, C]` unsigned, the experts that the rollout chose, X and more
        where it is not known; None: it was not asked, or blocks are dense.
      share: `[B] float32`, of a model with experts: the row's part of the minibatch's
        columns.
    """

    tokens: Array
    positions: Array
    segment: Array
    prefix: Array
    source: Array
    target: Array
    routes: Array | None = None
    share: Array | None = None


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Rows whose activations are held at once, on the host.

    Attributes:
      rows: what the forward reads.
      columns: what the loss reads, `[B, M]` each.
      num_sequences: static bound on `columns.sequence_ids`.
    """

    rows: Rows
    columns: losses.TokenColumns
    num_sequences: int


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How log-probabilities are computed.

    Attributes:
      model: the policy.
      law: whose log-probabilities are meant; not greedy, a point mass has no gradient.
      dtype: of activations and products.
      remat: see `transformer.forward`.
      head_chunk: predictions whose logits are held at once, so that the head needs
        `head_chunk x V` numbers; at least 1.
      routing: what is asked of a mixture's routers.
      kernels: without attention over a cache or native products: what has derivatives.
    """

    model: model_config.ModelConfig
    law: sampling.SamplingConfig = sampling.SamplingConfig()
    dtype: Any = jnp.float32
    remat: str = "full"
    head_chunk: int = 1024
    routing: routing_lib.Config = routing_lib.Config()
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE


def rows_of(
    packed: packing.Packed,
    routes: Sequence[np.ndarray] | None = None,
    num_experts: int = 0,
) -> Rows:
    """Select what the forward reads.

    `routes` are those of n completions, see `types.Completion`, of `num_experts`; None:
    the forward chooses for itself.
    """
    names = [f.name for f in dataclasses.fields(Rows)]
    rows = Rows(**{n: getattr(packed, n) for n in names if hasattr(packed, n)})
    if routes is None:
        return rows
    return rows.replace(routes=packing.gather_columns(packed, routes, num_experts))


def micro_batch(
    packed: packing.Packed,
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    old_logprobs: Sequence[np.ndarray] | None = None,
    rollout_logprobs: Sequence[np.ndarray] | None = None,
    ref_logprobs: Sequence[np.ndarray] | None = None,
    routes: Sequence[np.ndarray] | None = None,
    num_experts: int = 0,
    num_tokens: int = 1,
) -> MicroBatch:
    """Lay a batch's numbers out over the predictions of some of its rows.

    Args:
      packed: rows of the batch, whole or a part made by `packing.split`.
      advantages: `[n] float32`, for every completion of the batch.
      weights: `[n] float32`, of `losses.token_weights` over the batch.
      old_logprobs, rollout_logprobs, ref_logprobs: n arrays `[length_i] float32`, or
        None, see `losses.TokenColumns`.
      routes, num_experts: see `rows_of`; 0: blocks are dense.
      num_tokens: columns of the minibatch that are no padding; of a model with experts.

    Raises:
      ValueError: counts or lengths differ from the layout's.
    """

    def lay_out(values):
        if values is None:
            return None
        return packing.gather(packed, values).astype(np.float32)

    columns = losses.TokenColumns(
        valid=packed.valid,
        sequence_ids=packed.sequence,
        weights=lay_out(np.asarray(weights)),
        advantages=lay_out(np.asarray(advantages)),
        old_logprobs=lay_out(old_logprobs),
        rollout_logprobs=lay_out(rollout_logprobs),
        ref_logprobs=lay_out(ref_logprobs),
    )
    rows = rows_of(packed, routes, num_experts)
    if num_experts:
        own = np.sum(packed.segment >= 0, axis=1)
        rows = rows.replace(share=(own / max(num_tokens, 1)).astype(np.float32))
    return MicroBatch(rows, columns, packed.num_sequences)


def token_logprobs(
    params: model_params.Params,
    rows: Rows,
    *,
    cfg: ForwardConfig,
    with_entropy: bool = False,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, Array | None, experts.Routing | None]:
    """Compute the log-probability of every prediction of packed rows.

    The logits of `cfg.head_chunk` predictions exist at a time; with more than one chunk
    they are computed again in the backward pass. The layers of `params` are stacked or
    a tuple; `with_entropy` asks for the entropy of the predicting laws, too, and
    `constrain` is the sharding of `[D, B, T]` activations.

    Returns:
      `[B, M] float32` natural log-probabilities of `rows.target` under the sampling
      law, entropies `[B, M] float32` in nats or None, and what the routers of a mixture
      did.
    """
    out = transformer.forward(
        params,
        cfg.model,
        rows.tokens,
        rows.positions,
        attention.Visibility(segment=rows.segment, prefix=rows.prefix),
        dtype=cfg.dtype,
        with_cache_columns=False,
        remat=cfg.remat,
        constrain=constrain,
        routes=routing_lib.given(rows.routes, cfg.routing),
        kernels=cfg.kernels,
    )
    hidden = out.hidden

    num_rows, num_predictions = rows.source.shape
    num_chunks = -(-num_rows * num_predictions // cfg.head_chunk)
    width = -(-num_predictions // num_chunks)
    num_chunks = -(-num_predictions // width)
    spare = num_chunks * width - num_predictions

    def cut(x):
        return jnp.pad(x, ((0, 0), (0, spare))).reshape(num_rows, num_chunks, width)

    def one_chunk(source, target):
        features_DBC = jnp.take_along_axis(hidden, source[None], axis=2)
        law = sampling.law(transformer.logits(params, features_DBC), cfg.law)
        logprobs = law.logprob_of(target)
        return logprobs, law.entropy() if with_entropy else None

    source, target = cut(rows.source), cut(rows.target)
    if num_chunks == 1:
        return *one_chunk(source[:, 0], target[:, 0]), out.routing
    chunks = jnp.moveaxis(source, 1, 0), jnp.moveaxis(target, 1, 0)
    outputs = lax.map(jax.checkpoint(lambda chunk: one_chunk(*chunk)), chunks)

    def join(x):
        joined = jnp.moveaxis(x, 0, 1).reshape(num_rows, num_chunks * width)
        return joined[:, :num_predictions]

    return *jax.tree.map(join, outputs), out.routing


@struct.dataclass
class Gradient:
    """Sums over the micro-batches of a minibatch.

    Attributes:
      params: gradient of the loss; float32, as the masters.
      loss: `[] float32`.
    """

    params: model_params.Params
    loss: Array


def accumulate(
    params: model_params.Params,
    carry: Gradient,
    rows: Rows,
    columns: losses.TokenColumns,
    *,
    cfg: ForwardConfig,
    loss_cfg: losses.LossConfig,
    num_sequences: int,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> tuple[Gradient, dict[str, Array], Array]:
    """Add a micro-batch's loss and gradient to `carry`, those of the ones before.

    The layers of `params` are stacked; configs and `num_sequences` are static, and
    `constrain` is the sharding of `[D, B, T]` activations.

    Returns:
      The sums, the metric sums of `losses.policy_loss` for this micro-batch
      alone, and its log-probabilities `[B, M] float32`.
    """

    def loss(params):
        logprobs, entropy, routing = token_logprobs(
            params, rows, cfg=cfg, with_entropy=True, constrain=constrain
        )
        if not loss_cfg.entropy_coef:
            entropy = lax.stop_gradient(entropy)
        flat = jax.tree.map(jnp.ravel, columns)
        value, sums = losses.policy_loss(
            logprobs.ravel(),
            entropy.ravel(),
            flat,
            cfg=loss_cfg,
            num_sequences=num_sequences,
        )
        if routing is not None:
            extra, own = routing_lib.losses(
                routing, rows.routes, rows.share, cfg.routing
            )
            value, sums = value + extra, sums | own
        return value, (sums, logprobs)

    grad, (sums, logprobs) = jax.grad(loss, has_aux=True)(params)
    own = Gradient(params=grad, loss=sums["loss"])
    return jax.tree.map(jnp.add, carry, own), sums, logprobs
