"""Unrolled drafting over whole texts: what training and measuring have in common.

The alignment is that of `models.drafter`. A base is a position t that drafting could
start from. Step u = 0 .. U - 1 of a base is the tree node u levels below it:

    rotary position t + u     the token of position t + u + 1 is its input
                              with the feature that step u - 1 made (0: the target's)
    predicts                  the target's law at position t + u + 1,
                              from which the token of position t + u + 2 was drawn

As in drafting, it sees the keys of step 0 at positions up to t, and of the steps 1 .. u
those of its own base. A block drafter makes all steps of a base in one pass: step u is
mask u at the base, which sees the base's other masks, and predicts the same law given
the token of position t + u + 1 (`models.drafters.block`).

Letters here, besides those of `types`: M bases of a row, U unrolled steps, Q
predictions of all rows laid end to end, Vd tokens that can be proposed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import attention
from tlt_jax.models.drafters import block, drafter
from tlt_jax.types import Array


@struct.dataclass
class Batch:
    """Rows of texts side by side that see only themselves.

    Attributes:
      tokens: `[B, T] int32`, padding 0.
      positions: `[B, T] int32`, counted within the text, padding 0.
      segment: `[B, T] int32`, number of the text in its row, padding -1.
      features: `[B, T, n * D]`, the target's, or None: `hidden` is the feature.
      hidden: `[B, T, D]`, the target's last features after the final norm.
      bases: `[B, M] int32`, columns that are bases, rising, padding 0. Those of a text
        follow one another without a gap.
      valid: `[B, M] bool`, the base exists; then so does the token two columns on.
      keys: `[B, M, 2] uint32`, noise keys of the texts.
    """

    tokens: Array
    positions: Array
    segment: Array
    features: Array | None
    hidden: Array
    bases: Array
    valid: Array
    keys: Array


@struct.dataclass
class Target:
    """What a drafter uses of its target, unchanged by training.

    Attributes:
      embed: `[V, D]`.
      head: `[Vd, D]`, see `drafter_head.head_rows`.
      draft_ids: `[Vd] int32` or None: all.
    """

    embed: Array
    head: Array
    draft_ids: Array | None = None


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How a training step is computed.

    Attributes:
      drafter: the drafter.
      dtype: of activations and products.
      head_chunk: bases whose logits are held at once.
      attention_block: bases whose scores are held at once.
      remat: compute each step's activations again in the backward pass.
    """

    drafter: drafter.DrafterConfig
    dtype: Any = jnp.float32
    head_chunk: int = 256
    attention_block: int = 256
    remat: bool = False


@struct.dataclass
class Seen:
    """What the bases of a row see of its columns, the same for all bases.

    Attributes:
      features: `[D, B, T]`, fused.
      keys, values: `[B, K, H, T]` of step 0.
    """

    features: Array
    keys: Array
    values: Array


def see(
    params: drafter.DrafterParams, batch: Batch, target: Target, *, cfg: ForwardConfig
) -> Seen:
    """Compute what every base may attend to; see `unroll` for the arguments."""
    features = batch.hidden if batch.features is None else batch.features
    features_DBT = jnp.moveaxis(features, -1, 0).astype(cfg.dtype)
    fused_DBT = drafter.fuse(params, cfg.drafter, features_DBT)
    columns_T = jnp.arange(batch.tokens.shape[1])
    # Wanted are the keys and values of all columns. What a column itself attends to
    # would decide its output alone, which nobody asks for: any attention will do, and
    # the compiler leaves it out.
    output = drafter.apply(
        params,
        cfg.drafter,
        _embed_ahead(batch, target, columns_T, 1, cfg.dtype),
        fused_DBT,
        batch.positions,
        functools.partial(attention.attend_same, scale=1.0),
        dtype=cfg.dtype,
    )
    keys_BKHT, values_BKHT = _rows_first(output)
    return Seen(fused_DBT, keys_BKHT, values_BKHT)


def unroll(
    params: drafter.DrafterParams,
    batch: Batch,
    target: Target,
    num_steps: int,
    *,
    cfg: ForwardConfig,
    detach: bool = False,
    seen: Seen | None = None,
) -> tuple[Array, ...]:
    """Compute the features of every base's unrolled steps.

    Keys of step 0 are those of all columns, since later steps see them; everything else
    is computed for the bases alone: each attends to the former under a mask and to its
    own base's further steps at its own index. So bases may be computed part by part.

    U is `num_steps`, of a block drafter at most K. With `detach` gradients end between
    steps; `seen` is that of `see`, where it was computed before.

    Returns:
      U arrays `[D, B, M]`. A step that reaches beyond its text has no meaning.
    """
    if cfg.drafter.block_size:
        return _blocks(params, batch, target, num_steps, cfg, seen)
    scale = cfg.drafter.layer.head_dim**-0.5
    if seen is None:
        seen = see(params, batch, target, cfg=cfg)
    positions_BM = take(batch.positions, batch.bases)

    def one_step(params, features_DBM, earlier, u):
        def attend(query_BKGMH, keys_BKHM, values_BKHM):
            # The columns of the text up to the base: shared by all bases, under a mask.
            partial = _attend_bases(query_BKGMH, seen, batch, scale, cfg)
            # The base's own steps before this one, and itself: one key each, at the
            # same index, so that no mask is needed. Step 0 of a base is its column,
            # which is among those above.
            for own in (*earlier, (keys_BKHM, values_BKHM)) if u else ():
                here = attention.attend_same(query_BKGMH, *own, scale=scale)
                partial = attention.join(partial, here)
            return partial

        output = drafter.apply(
            params,
            cfg.drafter,
            _embed_ahead(batch, target, batch.bases, u + 1, cfg.dtype),
            features_DBM,
            positions_BM + u,
            attend,
            dtype=cfg.dtype,
        )
        return output.hidden, _rows_first(output)

    if cfg.remat:
        one_step = jax.checkpoint(one_step, static_argnums=3)
    steps_DBM: list[Array] = []
    # Step 0 reads the target's features, the further ones those of the step before:
    # the drafter learns from its own mistakes, as it will make them.
    features_DBM = take(seen.features, batch.bases[None])
    earlier: tuple[tuple[Array, Array], ...] = ()
    for u in range(num_steps):
        hidden_DBM, own = one_step(params, features_DBM, earlier, u)
        features_DBM = lax.stop_gradient(hidden_DBM) if detach else hidden_DBM
        steps_DBM.append(hidden_DBM)
        if u:
            earlier = (*earlier, own)
    return tuple(steps_DBM)


def _blocks(params, batch, target, num_steps, cfg, seen) -> tuple[Array, ...]:
    """Compute a block behind every base; see `unroll`.

    The K columns of a base, itself and its masks, stand M apart: place outermost.
    """
    size, num_bases = cfg.drafter.block_size, batch.bases.shape[1]
    if num_steps > size:
        raise ValueError(
            f"num_steps={num_steps} of a drafter that guesses blocks of {size}: "
            "measure and train as many at most."
        )
    scale = cfg.drafter.layer.head_dim**-0.5
    if seen is None:
        seen = see(params, batch, target, cfg=cfg)

    def of_columns(x):
        """Repeat `[..., M]` for every place, `[..., K x M]`."""
        return jnp.concatenate([x] * size, axis=-1)

    wide = batch.replace(bases=of_columns(batch.bases))
    place_C = jnp.repeat(jnp.arange(size), num_bases)

    def attend(query_BKGCH, keys_BKHC, values_BKHC):
        shared = _attend_bases(query_BKGCH, seen, wide, scale, cfg)
        own = _attend_masks(query_BKGCH, keys_BKHC, values_BKHC, size, scale)
        return attention.join(shared, own)

    def compute(params):
        output = drafter.apply(
            params,
            cfg.drafter,
            of_columns(_embed_ahead(batch, target, batch.bases, 1, cfg.dtype)),
            of_columns(take(seen.features, batch.bases[None])),
            take(batch.positions, wide.bases) + place_C,
            attend,
            added=block.masks_of(params.block, place_C[None], cfg.dtype),
            dtype=cfg.dtype,
        )
        return output.hidden

    hidden_DBC = (jax.checkpoint(compute) if cfg.remat else compute)(params)
    steps_DBM = jnp.split(hidden_DBC, size, axis=2)
    eps = cfg.drafter.layer.rms_norm_eps

    def conditional(u):
        before_DBM = _embed_ahead(batch, target, batch.bases, u + 1, cfg.dtype)
        code_RBM = block.code_of(params.block, before_DBM, eps)
        return block.follow(params.block, steps_DBM[u], code_RBM)

    return tuple(conditional(u) for u in range(num_steps))


def _attend_masks(query, keys, values, size, scale) -> attention.Partial:
    """Attend among the masks of each base: queries `[B, K, G, size x M, H]`.

    A base itself, at place 0, neither sees them nor is seen, as its column was before.
    """
    batch, num_kv, group, num_columns, head_dim = query.shape
    num_bases = num_columns // size

    def apart(x, axis):
        """Make bases rows: `[B x M, K, ...]` with the places at `axis`."""
        x = x.reshape(*x.shape[:axis], size, num_bases, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 1)
        return x.reshape(batch * num_bases, *x.shape[2:])

    is_mask = jnp.arange(size) > 0
    part = attention.attend_masked(
        *(apart(query, 3), apart(keys, 3), apart(values, 3)),
        (is_mask[:, None] & is_mask)[None],
        scale=scale,
    )

    def together(x):
        """Bring `[B x M, K, G x size, ...]` to `[B, K, G x size x M, ...]`."""
        x = x.reshape(batch, num_bases, num_kv, group * size, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(batch, num_kv, group * num_columns, *x.shape[4:])

    return jax.tree.map(together, part)


def bases_from(batch: Batch, start: Array | int, size: int) -> Batch:
    """Take `size` bases of each row from `start` on; there are none behind the last."""

    def cut(x):
        # Padded first: a slice that reached over the end would be moved to the left.
        x = jnp.pad(x, [(0, 0), (0, size)] + [(0, 0)] * (x.ndim - 2))
        return lax.dynamic_slice_in_dim(x, start, size, 1)

    return batch.replace(
        bases=cut(batch.bases), valid=cut(batch.valid), keys=cut(batch.keys)
    )


def step_exists(batch: Batch, num_steps: int) -> Array:
    """Say which steps predict a token that their text has, `[U, B, M] bool`."""
    spare = [(0, 0), (0, num_steps - 1)]
    bases = jnp.pad(batch.bases, spare)
    valid = jnp.pad(batch.valid, spare)
    segment = jnp.pad(take(batch.segment, batch.bases), spare, constant_values=-1)
    width = batch.bases.shape[1]

    def one(u):
        # Bases of a text follow one another, so that step u of a base predicts the law
        # of the u-th base behind it: if there is none, the text has ended.
        later = slice(u, u + width)
        same_BM = (bases[:, later] == batch.bases + u) & (
            segment[:, later] == segment[:, :width]
        )
        return batch.valid & valid[:, later] & same_BM

    return jnp.stack([one(u) for u in range(num_steps)])


@struct.dataclass
class Predictions:
    """All predictions of a batch, rows laid end to end and filled up to whole chunks.

    Step u of base q predicts from the law of index q + u.

    Attributes:
      hidden: `[U, D, Q] float32`, the drafter's features.
      exists: `[U, Q] float32`, 1 where the prediction exists, else 0.
      laws: arrays `[Q + U - 1, ...]`, what belongs to the laws.
    """

    hidden: Array
    exists: Array
    laws: Any

    def chunk(self, start: Array, size: int) -> "Predictions":
        """Take `size` bases from `start` on, with their laws."""
        more = size + self.hidden.shape[0] - 1
        return Predictions(
            hidden=lax.dynamic_slice_in_dim(self.hidden, start, size, 2),
            exists=lax.dynamic_slice_in_dim(self.exists, start, size, 1),
            laws=jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, start, more, 0), self.laws
            ),
        )

    def starts(self, size: int) -> Array:
        """First bases of the chunks of `size`."""
        return jnp.arange(0, self.hidden.shape[2], size)


def predictions(
    steps: tuple[Array, ...], exists: Array, laws: Any, chunk: int
) -> Predictions:
    """Lay rows end to end, so that Q is a multiple of `chunk`.

    Steps and `exists` are of `unroll` and `step_exists`; `laws` are arrays
    `[B, M + U - 1, ...]`, of the law that step 0 of each base predicts from, and of the
    bases behind: see `bases_from`.
    """
    hidden_UDBM = jnp.stack(steps)
    more, (num_rows, width) = len(steps) - 1, hidden_UDBM.shape[2:]
    # A row takes M + U - 1 places, so that index q + u is in its own row always.
    total = num_rows * (width + more)
    behind = -total % chunk

    def flatten(x, axis, extra=0):
        """Turn axes `axis` and `axis + 1`, rows and bases, into one."""
        pads = [(0, 0)] * x.ndim
        pads[axis + 1] = (0, width + more - x.shape[axis + 1])
        x = jnp.pad(x, pads)
        x = x.reshape(*x.shape[:axis], total, *x.shape[axis + 2 :])
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, behind + extra)
        return jnp.pad(x, pads)

    return Predictions(
        hidden=flatten(hidden_UDBM, 2),
        exists=flatten(exists.astype(jnp.float32), 1),
        laws=jax.tree.map(lambda x: flatten(x, 0, more), laws),
    )


def take(x: Array, columns: Array) -> Array:
    """Take columns `[..., M]` of the last axis; those beyond it are its last one."""
    return jnp.take_along_axis(x, jnp.minimum(columns, x.shape[-1] - 1), axis=-1)


def _embed_ahead(batch, target, columns, ahead, dtype):
    """Embed the tokens `ahead` of columns `[..., M]`, `[D, B, M]`."""
    columns_BM = jnp.broadcast_to(columns, (len(batch.tokens), columns.shape[-1]))
    tokens_BM = take(batch.tokens, columns_BM + ahead)
    return jnp.moveaxis(target.embed[tokens_BM].astype(dtype), -1, 0)


def _rows_first(output: drafter.Output) -> tuple[Array, Array]:
    """Keys and values `[B, K, H, M]` of the layer's `[K, H, B, M]`."""
    return jnp.moveaxis(output.keys, 2, 0), jnp.moveaxis(output.values, 2, 0)


def _attend_bases(query_BKGMH, seen, batch, scale, cfg):
    """Attend from bases to their texts' columns up to them, a block at a time.

    Scores are `[B, K, G, M, T]`, the largest array of a step by far: of a block of
    bases they are made, used, and in the backward pass made again.
    """
    width, block = query_BKGMH.shape[3], cfg.attention_block
    segment_BM = take(batch.segment, batch.bases)
    columns_T = jnp.arange(batch.tokens.shape[1])

    def one_block(query_BKGMH, bases_BM, segment_BM):
        mask_BMT = (columns_T[None, None] <= bases_BM[..., None]) & (
            batch.segment[:, None] == segment_BM[..., None]
        )
        return attention.attend_masked(
            query_BKGMH, seen.keys, seen.values, mask_BMT, scale=scale
        )

    if width <= block:
        return one_block(query_BKGMH, batch.bases, segment_BM)
    # Whole blocks; the queries behind the last base are cut off again below.
    spare = -width % block
    query_BKGMH = jnp.pad(query_BKGMH, [(0, 0)] * 3 + [(0, spare), (0, 0)])
    pads = [(0, 0), (0, spare)]
    bases_BM, segment_BM = jnp.pad(batch.bases, pads), jnp.pad(segment_BM, pads)

    def cut(start):
        axes = (query_BKGMH, 3), (bases_BM, 1), (segment_BM, 1)
        return one_block(
            *(lax.dynamic_slice_in_dim(x, start, block, axis) for x, axis in axes)
        )

    parts = lax.map(jax.checkpoint(cut), jnp.arange(0, width + spare, block))
    batch_size, num_kv, group = query_BKGMH.shape[:3]

    def whole(x):
        # [blocks, B, K, G x block, ...] to [B, K, G x M, ...]: G stays outermost, and
        # the blocks of each come end to end.
        x = x.reshape(-1, batch_size, num_kv, group, block, *x.shape[4:])
        x = jnp.moveaxis(x, 0, 3)
        x = x.reshape(batch_size, num_kv, group, -1, *x.shape[5:])[:, :, :, :width]
        return x.reshape(batch_size, num_kv, group * width, *x.shape[4:])

    return jax.tree.map(whole, parts)
