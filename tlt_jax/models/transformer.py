"""The one forward of a decoder: prefill, decode, verification, log-probs, training.

It reads the cache and returns the new keys and values; the caller appends what is
accepted, so nothing is ever rolled back and the layer loop carries no cache.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.cpu_kernels import product as cpu_product
from tlt_jax.models import (
    attention,
    experts,
    flash_attention,
    kernel_attention,
    kv_cache,
    layers,
    ragged,
)
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.pallas_kernels.one_column import api as one_column
from tlt_jax.pallas_kernels.verify_attention import api as verify_attention
from tlt_jax.pallas_kernels.verify_attention import validators
from tlt_jax.types import Array

REMAT_POLICIES = ("none", "full", "dots")

# Above it logits have the vocabulary last from the start: on a CPU, 49152 words and 576
# features, 128 columns take 51 ms either way and 512 columns 102 against 158 ms.
_MANY_COLUMNS = 128


@struct.dataclass
class Output:
    """What a forward returns.

    Attributes:
      hidden: `[D, B, T]`, features after the final norm.
      keys, values: `[L, K, H, B, T]`, keys rotated; a tuple of L where the layers are
        unrolled; None if not asked for.
      features: tuple of `[D, B, T]`, outputs of the layers asked for, before any norm.
      routing: of all layers, see `experts.Routing`; None where blocks are dense.
    """

    hidden: Array
    keys: kv_cache.Fresh | None
    values: kv_cache.Fresh | None
    features: tuple[Array, ...]
    routing: experts.Routing | None = None


def forward(
    params: model_params.Params,
    cfg: model_config.ModelConfig,
    tokens: Array,
    positions: Array,
    visibility: attention.Visibility | None = None,
    view: kv_cache.CacheView | None = None,
    rows: ragged.Ragged | None = None,
    *,
    routes: Array | None = None,
    dtype=jnp.float32,
    features: tuple[int, ...] = (),
    with_cache_columns: bool = True,
    remat: str = "none",
    constrain: Callable[[Array], Array] = lambda x: x,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Output:
    """Compute features of `tokens`, given the cached past of their rows.

    Args:
      params: the weights; stacked layers are scanned over, a tuple is unrolled.
      cfg: the model.
      tokens: `[B, T] int32`; padding holds any id of the vocabulary.
      positions: `[B, T] int32`, rotary positions.
      visibility: which fresh tokens see which; None: causal within the row.
      view: the cached past, seen by every fresh token; None: there is none.
      rows: where the view's rows lie in one row of N columns: then T = N and B = 1 of
        all arrays but the view's and the visibility's, `[B, W, W]`; None: as they do.
      routes: `[L, C, B, T] int32`, experts to take in place of those that routers
        choose, see `experts.mlp`; None: none are given.
      dtype: of activations and products; norms, softmax and scores are float32.
      features: indices of layers whose outputs are returned.
      with_cache_columns: return the new keys and values.
      remat: `none`, `full` (a layer's activations are computed again in the backward
        pass) or `dots` (products are kept, the rest computed again).
      constrain: applied to `[D, B, T]` activations between layers (their sharding).
      kernels: what computes products and attention; the portable ones have
        derivatives.

    Raises:
      ValueError: `remat` is not one of the three, or a feature's layer is not there.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat={remat!r}: use one of {', '.join(REMAT_POLICIES)}.")
    absent = [i for i in features if not 0 <= i < cfg.num_layers]
    if absent:
        raise ValueError(
            f"features names layers {absent} of a model with num_layers="
            f"{cfg.num_layers}: use 0 to {cfg.num_layers - 1}."
        )
    if visibility is None:
        visibility = attention.Visibility()
    if view is not None and kernels.checked:
        view = checked_view(view, positions, visibility, rows)
    # Angles are the same in all layers: cos and sin [H / 2, B, T], once.
    rope = layers.rope_tables(cfg, positions)
    # Rows of the table [B, T, D], turned so that features come first.
    x_DBT = constrain(jnp.moveaxis(params.embed[tokens].astype(dtype), -1, 0))
    by_row = positions if rows is None else rows.unpack(positions)
    where = dict(positions=by_row, visibility=visibility, view=view)
    is_token = None if visibility.segment is None else visibility.segment >= 0
    flash = None
    if kernels.training is not None and view is None and is_token is not None:
        flash = functools.partial(
            flash_attention.attend,
            within=flash_attention.sequences(visibility),
            scale=cfg.head_dim**-0.5,
            flash=kernels.training,
        )

    # One layer for both ways to walk them: its index is an int where they are unrolled,
    # and traced where they are scanned over.
    def one_layer(layer, x_DBT, index, window, given):
        attend = functools.partial(
            attend_parts, **where, index=index, window=window, kernel=kernels.attention
        )
        attend = flash or kernel_attention.by_row(attend, rows)
        # The native kernel rotates and attends in one, where shapes allow it.
        native, head_dim = None, cfg.head_dim
        if kernel_attention.takes_native(
            kernels, x_DBT, head_dim, view, visibility, window, rows
        ):
            native = functools.partial(
                kernel_attention.attend_native,
                view=view,
                layer=index,
                visibility=visibility,
                rows=rows,
            )
        x_DBT, keys, values, routing = decoder_layer(
            *(layer, x_DBT, cfg, rope, attend, kernels),
            attend_columns=native,
            is_token=is_token,
            routes=given,
        )
        x_DBT = constrain(x_DBT)
        # [K, H, B, T] each: read once more by whoever appends them, and never here.
        columns = (keys, values) if with_cache_columns else (None, None)
        return x_DBT, (*columns, routing)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else None
        one_layer = jax.checkpoint(one_layer, policy=policy)
    run = _unrolled if isinstance(params.layers, tuple) else _scanned
    x_DBT, (keys, values, routing), kept = run(
        params, cfg, one_layer, x_DBT, features, routes
    )
    hidden = layers.rms_norm(x_DBT, params.final_norm, cfg.rms_norm_eps)
    return Output(hidden, keys, values, kept, routing)


def checked_view(
    view: kv_cache.CacheView,
    positions: Array,
    visibility: attention.Visibility,
    rows: ragged.Ragged | None = None,
) -> kv_cache.CacheView:
    """Have the host check what attention reads by, before it does; all layers' at once.

    `positions` are `[B, T] int32`, of the fresh tokens, for `rows` see `forward`. Using
    the view returned fails where a value is wrong, see `validators.checked_lengths`.
    """
    cache = view.cache
    if rows is not None:
        # Beyond a row's own columns stand others', which no query of it sees.
        own_BW = jnp.arange(rows.width) < rows.counts[:, None]
        positions = jnp.where(own_BW, rows.unpack(positions), view.lengths[:, None])
    lengths = validators.checked_lengths(
        (cache.keys.shape[0], cache.num_pages, cache.page_size),
        view.page_table,
        view.lengths,
        positions,
        kernel_attention.words_of(visibility),
        first_page=kv_cache.SCRATCH_PAGE + 1,
    )
    return view.replace(lengths=lengths)


def drafter_features(out: Output) -> Array:
    """Return the features that a drafter reads, `[n x D, B, T]`.

    Those of the layers asked for, one over the other; if none were, the last ones.
    """
    return jnp.concatenate(out.features) if out.features else out.hidden


def logits(
    params: model_params.Params,
    hidden: Array,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Array:
    """Multiply features by the LM head; see `head_logits`."""
    return head_logits(params.head, hidden, kernels)


def head_logits(
    head: Array, hidden: Array, kernels: kernels_lib.Kernels = kernels_lib.PORTABLE
) -> Array:
    """Multiply features by rows of an LM head.

    Args:
      head: `[V, D]`, all rows or some.
      hidden: `[D, ...]`, after the final norm.
      kernels: see `forward`.

    Returns:
      `[..., V] float32`: the vocabulary is last, as sampling laws have it.
    """
    head = head.astype(hidden.dtype)
    if kernels.one_column is not None and one_column.takes(head, hidden):
        column = hidden.reshape(-1, 1, 1)
        logits = one_column.product(
            head, column, implementation=kernels.one_column, dtype=jnp.float32
        )
        return logits.reshape(*hidden.shape[1:], -1)
    if layers.takes_native(kernels, hidden):
        return cpu_product.product_transposed(head, hidden)
    prec = layers.precision(hidden.dtype)
    options = dict(precision=prec, preferred_element_type=jnp.float32)
    if math.prod(hidden.shape[1:]) > _MANY_COLUMNS:
        # The result is so large that transposing it costs more than the better form of
        # the product gains. The barrier keeps the features' own transposition apart.
        rows = lax.optimization_barrier(jnp.moveaxis(hidden, 0, -1))
        return jnp.einsum("...d,vd->...v", rows, head, **options)
    logits_first = jnp.tensordot(head, hidden, axes=1, **options)
    # Without the barrier the compiler for CPUs folds the transposition into the
    # product, which then takes up to ten times as long.
    return jnp.moveaxis(lax.optimization_barrier(logits_first), 0, -1)


def _unrolled(params, cfg, one_layer, x_DBT, features, routes):
    columns, outputs = [], []
    for index, layer in enumerate(params.layers):
        given = None if routes is None else routes[index]
        x_DBT, fresh = one_layer(layer, x_DBT, index, cfg.window(index), given)
        columns.append(fresh)
        outputs.append(x_DBT)
    keys, values, routing = zip(*columns, strict=True)
    # Small beside keys and values, which stay apart.
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *routing) if cfg.experts else None
    return x_DBT, (keys, values, stacked), tuple(outputs[i] for i in features)


def _scanned(params, cfg, one_layer, x_DBT, features, routes):
    # A scan's layers are one program: a window is then a number for each of them, and
    # those without one get one that nothing exceeds.
    windows = None
    if any(cfg.windowed_layers):
        widths = [cfg.window(i) for i in range(cfg.num_layers)]
        windows = jnp.array(
            [jnp.iinfo(jnp.int32).max if w is None else w for w in widths], jnp.int32
        )
    # Carried are the outputs asked for, [n, D, B, T]: a scan that returned every one
    # would hold L. Which layer runs is traced, so each slot is written or kept.
    kept = jnp.zeros((len(features), *x_DBT.shape), x_DBT.dtype)

    def body(carry, scanned):
        x_DBT, kept = carry
        index, layer, window, given = scanned
        x_DBT, fresh = one_layer(layer, x_DBT, index, window, given)
        for slot, wanted in enumerate(features):
            kept = kept.at[slot].set(jnp.where(index == wanted, x_DBT, kept[slot]))
        return (x_DBT, kept), fresh

    xs = (jnp.arange(cfg.num_layers), params.layers, windows, routes)
    (x_DBT, kept), columns = lax.scan(body, (x_DBT, kept), xs)
    return x_DBT, columns, tuple(kept[i] for i in range(len(features)))


def decoder_layer(
    layer: model_params.LayerParams,
    x_DBT: Array,
    cfg: model_config.ModelConfig,
    rope: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], attention.Partial],
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
    attention_input: Array | None = None,
    attend_columns: Callable[..., tuple[Array, Array, Array]] | None = None,
    is_token: Array | None = None,
    routes: Array | None = None,
) -> tuple[Array, Array, Array, experts.Routing | None]:
    """Compute one layer: attention and feed-forward block, each behind its norm.

    Args:
      layer: one layer's weights.
      x_DBT: `[D, B, T]`.
      cfg: the model.
      rope: cos and sin of the positions, see `layers.rope_tables`.
      attend: what the queries see: takes queries `[B, K, G, T, H]`, fresh keys and
        values `[B, K, H, T]`, and returns the attention over M = G x T queries.
      kernels: see `forward`.
      attention_input: `[in, B, T]`, what queries, keys and values are projected from;
        None: the normed `x_DBT`.
      attend_columns: takes the place of `attend` and of rotation: takes queries, keys
        and values `[K, G + 2, H, B, T]` and `rope`, returns heads `[K, G, H, B, T]`,
        and rotated keys and values `[K, H, B, T]`.
      is_token, routes: of a mixture of experts, see `experts.mlp`.

    Returns:
      The layer's output `[D, B, T]`, its keys and values `[K, H, B, T]`, and what its
      router did, None where the block is dense.
    """
    # Both blocks add to what came in, and read it normed.
    given, norm = attention_input, None
    if given is None:
        given, norm = x_DBT, (layer.attn_norm, cfg.rms_norm_eps)
    x_DBT, keys, values = _self_attention(
        layer, given, norm, x_DBT, cfg, rope, attend, kernels, attend_columns
    )
    norm = layer.mlp_norm, cfg.rms_norm_eps
    if cfg.experts is None:
        added_DBT = layers.mlp(layer, x_DBT, kernels, norm=norm, residual=x_DBT)
        return added_DBT, keys, values, None
    normed_DBT = layers.rms_norm(x_DBT, *norm)
    mixed_DBT, routing = experts.mlp(
        *(layer, normed_DBT, cfg.experts, kernels), is_token=is_token, given=routes
    )
    return x_DBT + mixed_DBT, keys, values, routing


def attend_parts(
    query: Array,
    keys: Array,
    values: Array,
    positions: Array,
    visibility: attention.Visibility,
    view: kv_cache.CacheView | None,
    index: Array | int,
    *,
    window: Array | int | None = None,
    kernel: verify_attention.Implementation | None = None,
    with_log_normaliser: bool = False,
) -> attention.Partial:
    """Attend over the fresh part and, where there is one, a layer's cached past.

    Args:
      query, keys, values, positions, visibility, window: see `attention.attend_fresh`.
      view: the cached past or None.
      index: the layer in the cache.
      kernel: what computes where there is a cached past; None: the portable walk.
      with_log_normaliser: the part will be joined with attention over more keys.
    """
    batch, num_kv, group, num_tokens, head_dim = query.shape
    options = dict(scale=head_dim**-0.5, window=window)
    # An accelerator's kernel joins both parts itself. Without a past there are no
    # pages, and nothing that it would save.
    if view is not None and kernel is not None:
        return kernel_attention.attend(
            *(query, keys, values, view, index, positions, visibility),
            with_log_normaliser=with_log_normaliser,
            kernel=kernel,
            **options,
        )
    partial = attention.attend_fresh(
        query, keys, values, visibility, positions=positions, **options
    )
    if view is None:
        return partial
    # All queries of a kv head read its pages together: M = G x T of them.
    query_BKMH = query.reshape(batch, num_kv, group * num_tokens, head_dim)
    positions_BM = jnp.tile(positions, (1, group))
    cached = attention.attend_cached(
        query_BKMH, view, index, positions=positions_BM, **options
    )
    return attention.join(cached, partial)


def _self_attention(
    layer, x_DBT, norm, residual_DBT, cfg, rope, attend, kernels, attend_columns
):
    """Norm, project, rotate, attend, project back, and add to the residual."""
    group = cfg.heads_per_kv
    # All projections in one product, [K, C, H, B, T] with C = G + 2: a kv head's
    # queries, its key and its value, so that devices that split K have whole families.
    qkv_KCHBT = layers.product(layer.qkv, x_DBT, kernels, layer.qkv_bias, norm=norm)
    query_KGHBT, key_K1HBT, value_K1HBT = jnp.split(
        qkv_KCHBT, [group, group + 1], axis=1
    )
    if layer.q_norm is not None:
        eps = cfg.rms_norm_eps
        query_KGHBT = _norm_heads(query_KGHBT, layer.q_norm, eps)
        key_K1HBT = _norm_heads(key_K1HBT, layer.k_norm, eps)
        qkv_KCHBT = jnp.concatenate([query_KGHBT, key_K1HBT, value_K1HBT], axis=1)
    if attend_columns is not None:
        heads_KGHBT, key_KHBT, value_KHBT = attend_columns(qkv_KCHBT, *rope)
    else:
        heads_KGHBT, key_KHBT, value_KHBT = _rotate_and_attend(
            query_KGHBT, key_K1HBT, value_K1HBT, rope, attend
        )
    # As a plain product: with the heads' axes kept the compiler reorders the weight.
    out = layer.out.astype(x_DBT.dtype).reshape(layer.out.shape[0], -1)
    heads = heads_KGHBT.reshape(-1, *x_DBT.shape[1:])
    added_DBT = layers.product(
        out, heads, kernels, layer.out_bias, residual=residual_DBT
    )
    return added_DBT, key_KHBT, value_KHBT


def _norm_heads(x_KGHBT: Array, scale: Array, eps: float) -> Array:
    """Norm every head by `scale [H]`, or all together by one with more axes."""
    if scale.ndim == 1:
        return layers.rms_norm(x_KGHBT, scale, eps, axis=2)
    flat = x_KGHBT.reshape(-1, *x_KGHBT.shape[3:])
    return layers.rms_norm(flat, scale.reshape(-1), eps).reshape(x_KGHBT.shape)


def _rotate_and_attend(query_KGHBT, key_K1HBT, value_K1HBT, rope, attend):
    """Attend by `attend`, which has tokens before elements; see `decoder_layer`."""
    num_kv, group, head_dim, batch, num_tokens = query_KGHBT.shape
    key_KHBT, value_KHBT = key_K1HBT[:, 0], value_K1HBT[:, 0]
    query_KGHBT = layers.rotate(query_KGHBT, *rope)
    key_KHBT = layers.rotate(key_KHBT, *rope)
    query_BKGTH = query_KGHBT.transpose(3, 0, 1, 4, 2)
    key_BKHT, value_BKHT = (x.transpose(2, 0, 1, 3) for x in (key_KHBT, value_KHBT))
    partial = attend(query_BKGTH, key_BKHT, value_BKHT)
    # What was joined in float32 goes on in the activations' type: [B, K, M, H], and
    # back to features first.
    heads_BKMH = attention.finish(partial).astype(query_BKGTH.dtype)
    heads_BKGTH = heads_BKMH.reshape(batch, num_kv, group, num_tokens, head_dim)
    return heads_BKGTH.transpose(1, 2, 4, 0, 3), key_KHBT, value_KHBT
