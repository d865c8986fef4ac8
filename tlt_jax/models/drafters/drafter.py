"""The drafter: one decoder layer that continues the target's features.

Alignment, here and everywhere: position t takes the target's feature of position t and
the token of position t + 1, is rotated by t, and predicts the token of position t + 2.
A row with n cached positions and its pending token x_n has inputs t = 0 .. n - 1, and
the output at n - 1 predicts x_{n+1}. Drafting goes on with the drafter's own output as
the feature. Embedding and head are the target's; some imported drafters bring a head.

Of the architectures `tlt`, ours, divides everything that it joins by its root mean
square, and so does `block`, which guesses K tokens in one pass (`block`); `eagle` and
`eagle3` are what published checkpoints mean (`drafter_layouts`).

References: Li et al., EAGLE, 2024, section 4.1; Li et al., EAGLE-3, 2025, section 3.1.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tlt_jax.models import (
    attention,
    kernel_attention,
    kv_cache,
    layers,
    ragged,
    transformer,
)
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import block as block_lib
from tlt_jax.types import Array

Architecture = Literal["tlt", "eagle", "eagle3", "block"]
ARCHITECTURES: tuple[Architecture, ...] = typing.get_args(Architecture)
# Of a drafter of which they were not measured.
SHARPNESS, TAU = 1.0, 0.5
_FAMILIES_OWN = ("tie_embeddings", "qkv_bias", "out_bias", "mlp_bias", "qk_norm")


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A drafter: what is computed, and for which target.

    Attributes:
      layer: the one layer as a model of one layer; ours is of the target's own type.
      target: what the target is, see `identify`.
      feature_layers: indices of the target's layers whose outputs are fused; empty: the
        feature is the target's last one, after its final norm.
      output_norm: `tlt`: the layer's output is normed before it is the drafter's
        feature. Not where it shall be the target's normed feature itself (EAGLE).
        `eagle3` norms it for the head alone, `eagle` never.
      draft_vocab_size: Vd, tokens that can be proposed; 0: all.
      max_length: positions of a text that the drafter was trained for; 0: any.
      architecture: see the module.
      join_bias: `eagle`: the product that joins token and feature has a bias.
      norm_before_residual: `eagle3`: the normed feature is what the layer adds to.
      own_head: `eagle3`: the drafter brings a head, and does not use the target's.
      block_size: `block`: K, tokens that a pass guesses; else 0.
      markov_rank: `block`: R, rank of what the token before adds to logits; else 0.
    """

    layer: model_config.ModelConfig
    target: str
    feature_layers: tuple[int, ...] = ()
    output_norm: bool = True
    draft_vocab_size: int = 0
    max_length: int = 0
    architecture: Architecture = "tlt"
    join_bias: bool = False
    norm_before_residual: bool = False
    own_head: bool = False
    block_size: int = 0
    markov_rank: int = 0

    def __post_init__(self):
        for name in ("draft_vocab_size", "max_length", "block_size", "markov_rank"):
            if type(getattr(self, name)) is not int:
                raise ValueError(
                    f"{name}={str(getattr(self, name))[:40]} is no integer: 0 stands "
                    "for all, or none."
                )
        for name in ("output_norm", "join_bias", "norm_before_residual", "own_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is neither True nor False.")
        if self.layer.num_layers != 1 or any(self.layer.windowed_layers):
            raise ValueError(
                f"layer has num_layers={self.layer.num_layers} and windowed_layers="
                f"{self.layer.windowed_layers}: a drafter is one layer without a "
                "window; make its config with drafter.of_target."
            )
        if not 0 <= self.draft_vocab_size <= self.layer.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} is outside the target's "
                f"vocabulary of {self.layer.vocab_size}: 0 stands for all of it."
            )
        if self.max_length < 0:
            raise ValueError(f"max_length={self.max_length} is negative: 0 is any.")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={self.architecture!r}: use {', '.join(ARCHITECTURES)}."
            )
        sizes = self.block_size, self.markov_rank, self.layer.d_model
        block_lib.check(*sizes, is_block=self.architecture == "block")
        num, wanted = len(self.feature_layers), {"eagle": (0,), "eagle3": (3,)}
        if num not in wanted.get(self.architecture, (num,)):
            raise ValueError(
                f"architecture={self.architecture!r} with feature_layers="
                f"{self.feature_layers}: EAGLE reads the target's last feature "
                "(features='last'), EAGLE-3 three layers ('low_mid_high')."
            )

    @property
    def is_own(self) -> bool:
        """Whether inputs are divided by their root mean square, as ours are."""
        return self.architecture in ("tlt", "block")

    @property
    def num_features(self) -> int:
        """n, features of the target per position."""
        return max(len(self.feature_layers), 1)

    @property
    def num_read(self) -> int:
        """n x D, rows of the target's features that are read."""
        return self.num_features * self.layer.d_model

    @property
    def num_draft_tokens(self) -> int:
        """Vd, tokens that can be proposed."""
        return self.draft_vocab_size or self.layer.vocab_size


@struct.dataclass
class DrafterParams:
    """A drafter's weights.

    Attributes:
      join: `[D, 2D]`, takes the token's embedding over the feature; None in `eagle3`.
      layer: one layer, unstacked. In `eagle` it has no `attn_norm`; in `eagle3` that
        is the embedding's, and `qkv` is `[K, G + 2, H, 2D]`.
      fuse: `[D, n * D]`, or None where the feature is the target's last one.
      norm: `[D]` or None.
      draft_ids: `[Vd] int32`, rising target ids that can be proposed, or None: all.
      sharpness, tau: float32 scalars, see `learned.Draft`; measured and not trained.
        None: they were not, see `measured`.
      join_bias: `[D]` or None.
      feature_norm: `[D]`, `eagle3` alone.
      head: `[Vd, D]` or None: the target's.
      block: what `block` has beside the layer, or None.
    """

    join: jax.Array | None
    layer: model_params.LayerParams
    fuse: jax.Array | None = None
    norm: jax.Array | None = None
    draft_ids: jax.Array | None = None
    sharpness: jax.Array | None = None
    tau: jax.Array | None = None
    join_bias: jax.Array | None = None
    feature_norm: jax.Array | None = None
    head: jax.Array | None = None
    block: block_lib.BlockParams | None = None


def measured(params: DrafterParams) -> tuple[np.float32, np.float32]:
    """Return sharpness and tau, as they were measured or as they are taken to be."""
    given = (params.sharpness, SHARPNESS), (params.tau, TAU)
    sharpness, tau = (np.float32(x if x is not None else other) for x, other in given)
    return sharpness, tau


@struct.dataclass
class Past:
    """Keys of earlier tree levels, which are in no cache.

    Attributes:
      keys, values: `[K, H, B, S]`, finite, also where nobody sees them.
      mask: `[B, T, S] bool`, which of them each query sees.
    """

    keys: Array
    values: Array
    mask: Array


@struct.dataclass
class Output:
    """What a forward returns.

    Attributes:
      hidden: `[D, B, T]`, the drafter's features: they go into the target's head, and
        back into the drafter.
      keys, values: `[K, H, B, T]`, keys rotated.
    """

    hidden: Array
    keys: Array
    values: Array


def identify(target: model_config.ModelConfig) -> str:
    """Name what a drafter's weights depend on in its target: family and sizes."""
    c = target
    return (
        f"{c.family}-L{c.num_layers}-D{c.d_model}-F{c.d_ff}-N{c.num_heads}"
        f"-K{c.num_kv_heads}-H{c.head_dim}-V{c.vocab_size}"
        + (f"-X{c.experts.num}-F{c.experts.d_ff}" if c.experts else "")
    )


def low_mid_high(num_layers: int) -> tuple[int, int, int]:
    """Choose the three layers that EAGLE-3 fuses.

    Reference: Li et al., EAGLE-3, 2025; indices 2, N/2 and N - 3 are those of its
    release, which however reads what goes into these layers, see `published_layers`.

    Raises:
      ValueError: the target has too few layers for three different ones.
    """
    chosen = (2, num_layers // 2, num_layers - 3)
    if not 2 < chosen[1] < chosen[2]:
        raise ValueError(
            f"num_layers={num_layers} has no layers 2 < N/2 < N - 3: name the target's "
            "feature_layers, or use none."
        )
    return chosen


def published_layers(num_layers: int) -> tuple[int, int, int]:
    """Choose the layers whose outputs EAGLE-3 checkpoints read that name none.

    SGLang, vLLM and the release take the inputs of layers 2, N/2 and N - 3.

    Raises:
      ValueError: the target has too few layers for three different ones.
    """
    low, mid, high = low_mid_high(num_layers)
    return low - 1, mid - 1, high - 1


def of_target(
    target: model_config.ModelConfig,
    *,
    feature_layers: tuple[int, ...] = (),
    output_norm: bool = True,
    draft_vocab_size: int = 0,
    max_length: int = 0,
    architecture: Architecture = "tlt",
    block_size: int = 0,
) -> DrafterConfig:
    """Describe a drafter for `target`.

    That of a published architecture is a Llama layer of the target's sizes. See
    `DrafterConfig` for the arguments.

    Raises:
      ValueError: a layer is not the target's, or a size is out of range.
    """
    absent = [i for i in feature_layers if not 0 <= i < target.num_layers]
    if absent:
        raise ValueError(
            f"feature_layers names layers {absent} of a target with num_layers="
            f"{target.num_layers}: use 0 to {target.num_layers - 1}."
        )
    plain = dict(num_layers=1, sliding_window=None, windowed_layers=())
    if architecture in ("eagle", "eagle3"):
        plain |= dict.fromkeys(_FAMILIES_OWN, False) | dict(family="llama")
        output_norm = architecture == "eagle3"
    return DrafterConfig(
        layer=dataclasses.replace(target.dense(), **plain),
        target=identify(target),
        feature_layers=tuple(feature_layers),
        output_norm=output_norm,
        draft_vocab_size=draft_vocab_size,
        max_length=max_length,
        architecture=architecture,
        block_size=block_size,
        markov_rank=block_lib.rank_of(target.d_model) if architecture == "block" else 0,
    )


def describe(cfg: DrafterConfig) -> DrafterParams:
    """Describe every trained leaf, none that is chosen or measured, as a `Weight`."""
    d, n = cfg.layer.d_model, cfg.num_features
    stacked = model_params.describe(cfg.layer).layers

    def table(num_inputs):
        shape = (d, num_inputs)
        return model_params.Weight(shape, ("embed", None), "normal", num_inputs)

    def vector(init):
        return model_params.Weight((d,), (None,), init)

    # One layer, which is never scanned over: without the axis L.
    layer = jax.tree.map(
        lambda w: dataclasses.replace(w, shape=w.shape[1:], axes=w.axes[1:]), stacked
    )
    described = DrafterParams(
        join=table(2 * d),
        layer=layer,
        fuse=table(n * d) if cfg.feature_layers else None,
        norm=vector("ones") if cfg.output_norm else None,
    )
    if cfg.architecture == "block":
        own = block_lib.describe(cfg.block_size, cfg.markov_rank, d)
        return described.replace(block=own)
    if cfg.architecture == "eagle":
        bias = vector("zeros") if cfg.join_bias else None
        return described.replace(layer=layer.replace(attn_norm=None), join_bias=bias)
    if cfg.architecture == "eagle3":
        wide = (*layer.qkv.shape[:-1], 2 * d)
        qkv = dataclasses.replace(layer.qkv, shape=wide, fan_in=2 * d)
        rows = (cfg.num_draft_tokens, d)
        head = model_params.Weight(rows, ("vocab", "embed"), "normal", d)
        return described.replace(
            join=None,
            layer=layer.replace(qkv=qkv),
            feature_norm=vector("ones"),
            head=head if cfg.own_head else None,
        )
    return described


def init(cfg: DrafterConfig, key: jax.Array, dtype=jnp.float32) -> DrafterParams:
    """Draw random weights; `draft_ids` are left to the caller."""
    return model_params.draw(describe(cfg), key, dtype)


def embed(target: model_params.Params, tokens: Array, dtype=jnp.float32) -> Array:
    """Look tokens `[B, T]` up in the target's embedding; `[D, B, T]`."""
    return jnp.moveaxis(target.embed[tokens].astype(dtype), -1, 0)


def fuse(
    params: DrafterParams,
    cfg: DrafterConfig,
    features: Array,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Array:
    """Make one feature `[D, B, T]` of the target's n.

    Each of several is divided by its root mean square first: the outputs of different
    layers differ by orders of magnitude, and single positions do, too. EAGLE-3 takes
    them as they are.

    Args:
      params, cfg: the drafter.
      features: `[n * D, B, T]`, the first layer's D rows first.
      kernels: see `transformer.forward`.
    """
    if params.fuse is None:
        return features
    # n arrays [D, B, T] stand one over the other.
    if cfg.is_own:
        parts = jnp.split(features, cfg.num_features)
        features = jnp.concatenate([unit(part, cfg) for part in parts])
    return layers.product(params.fuse, features, kernels)


def forward(
    params: DrafterParams,
    cfg: DrafterConfig,
    embedded: Array,
    features: Array,
    positions: Array,
    *,
    visibility: attention.Visibility | None = None,
    view: kv_cache.CacheView | None = None,
    past: Past | None = None,
    rows: ragged.Ragged | None = None,
    added: Array | None = None,
    dtype=jnp.float32,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Output:
    """Compute the drafter's features of one level or of a run of positions.

    Cache filling, extension and tree levels are this one function; it reads the cache,
    and the caller appends the keys of what was accepted.

    Args:
      params, cfg: the drafter.
      embedded: `[D, B, T]`, embedding of the token behind each position.
      features: `[D, B, T]`, fused features of the target or the drafter's own.
      positions: `[B, T] int32`, rotary positions.
      visibility: which fresh keys each query sees; None: causal within the row; for a
        tree level each sees itself alone.
      view: the drafter's cache, whose one layer every query sees; None: there is none.
      past: keys of earlier levels; None: there are none.
      added: see `apply`.
      rows, dtype, kernels: see `transformer.forward`.
    """
    visible = attention.Visibility() if visibility is None else visibility
    if view is not None and kernels.checked:
        # A block is no tree: in it columns see those behind them.
        tree = visible if added is None else attention.Visibility()
        view = transformer.checked_view(view, positions, tree, rows)
    by_row = positions if rows is None else rows.unpack(positions)

    # Disjoint parts of the keys: the fresh ones, the cache's and, while a tree is
    # drafted, the levels above, which stand in no order and in no cache.
    def attend(query, keys, values):
        options = dict(kernel=kernels.attention, with_log_normaliser=past is not None)
        partial = transformer.attend_parts(
            query, keys, values, by_row, visible, view, 0, **options
        )
        if past is None:
            return partial
        # [K, H, B, S] as the layer returned them, [B, K, H, S] as attention reads them.
        columns = (past.keys, past.values)
        columns = (jnp.moveaxis(x, 2, 0).astype(query.dtype) for x in columns)
        scale = cfg.layer.head_dim**-0.5
        earlier = attention.attend_masked(query, *columns, past.mask, scale=scale)
        return attention.join(earlier, partial)

    native = None
    if kernel_attention.takes_native(
        kernels, embedded, cfg.layer.head_dim, view, visible, rows=rows
    ):
        earlier = None if past is None else (past.keys, past.values, past.mask)
        seen = dict(view=view, layer=0, visibility=visible, past=earlier, rows=rows)
        native = functools.partial(kernel_attention.attend_native, **seen)
    options = dict(added=added, dtype=dtype, kernels=kernels, attend_columns=native)
    attend = kernel_attention.by_row(attend, rows)
    return apply(params, cfg, embedded, features, positions, attend, **options)


def apply(
    params: DrafterParams,
    cfg: DrafterConfig,
    embedded: Array,
    features: Array,
    positions: Array,
    attend: Callable[[Array, Array, Array], attention.Partial],
    *,
    added: Array | None = None,
    dtype=jnp.float32,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
    attend_columns: Callable[..., tuple[Array, Array, Array]] | None = None,
) -> Output:
    """Compute the drafter's features under any attention.

    In ours both halves of the input are divided by their root mean square: embeddings
    and features have scales of their own, and the drafter's features another one.
    `eagle` joins them as they are and has no norm before the attention. In `eagle3` the
    attention reads both, normed, side by side, and the layer adds to the feature.

    Args:
      params, cfg, embedded, features, positions, dtype, kernels: as for `forward`.
      added: `[D, B, T]`, to what was joined, before the layer; None: nothing.
      attend, attend_columns: see `transformer.decoder_layer`.
    """
    embedded_DBT, features_DBT = embedded.astype(dtype), features.astype(dtype)
    eps = cfg.layer.rms_norm_eps
    # Two arrays come out: x_DBT, what the layer adds to, and what its attention is
    # projected from, [in, B, T]; None: the normed x_DBT, as in any layer.
    attention_input = None
    if cfg.architecture == "eagle3":
        token_DBT = layers.rms_norm(embedded_DBT, params.layer.attn_norm, eps)
        normed_DBT = layers.rms_norm(features_DBT, params.feature_norm, eps)
        attention_input = jnp.concatenate([token_DBT, normed_DBT])
        x_DBT = normed_DBT if cfg.norm_before_residual else features_DBT
    else:
        halves = [embedded_DBT, features_DBT]
        if cfg.is_own:
            halves = [unit(x, cfg) for x in halves]
        # One over the other, [2D, B, T], and a product that makes one of both.
        joined = jnp.concatenate(halves)
        x_DBT = layers.product(params.join, joined, kernels, params.join_bias)
        if added is not None:
            x_DBT = x_DBT + added.astype(dtype)
        if cfg.architecture == "eagle":
            attention_input = x_DBT
    x_DBT, keys, values, _ = transformer.decoder_layer(
        params.layer,
        x_DBT,
        cfg.layer,
        layers.rope_tables(cfg.layer, positions),
        attend,
        kernels,
        attention_input=attention_input,
        attend_columns=attend_columns,
    )
    # Here in ours alone: the other architectures' feature goes on unnormed.
    if cfg.is_own and params.norm is not None:
        x_DBT = layers.rms_norm(x_DBT, params.norm, eps)
    return Output(hidden=x_DBT, keys=keys, values=values)


def unit(x: Array, cfg: DrafterConfig) -> Array:
    """Divide `[D, B, T]` by the root mean square over features."""
    return layers.rms_norm(x, jnp.ones(x.shape[0]), cfg.layer.rms_norm_eps)
