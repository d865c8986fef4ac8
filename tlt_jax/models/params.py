"""The weights of a decoder: one abstract description per leaf, and what it implies.

From `describe(cfg)` follow initialisation, shardings, restore targets and the mapping
to Hugging Face names; nothing else knows a shape. Weights are stored `[out, in]`.
"""

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax.models import config as model_config

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class Weight:
    """Abstract description of one leaf.

    Attributes:
      shape: of the leaf; stacked leaves have the layer axis first.
      axes: a logical name per axis, mapped to mesh axes by `sharding.ShardingRules`.
      init: `normal` (standard deviation `fan_in ** -0.5`), `ones` or `zeros`.
      fan_in: inputs of the product, for `normal`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str
    fan_in: int = 1


@struct.dataclass
class LayerParams:
    """One decoder layer, or all of them with a leading `L` on every leaf.

    Attributes:
      attn_norm: `[D]`.
      qkv: `[K, G + 2, H, D]`: for each key/value head its G query heads, then its key
        head, then its value head, so that splitting over K keeps a head's family
        together.
      qkv_bias: `[K, G + 2, H]` or None.
      q_norm, k_norm: `[H]`; `[K, G, H]` and `[K, H]` where all heads are normed
        together; or None.
      out: `[D, K, G, H]`.
      out_bias: `[D]` or None.
      mlp_norm: `[D]`.
      gate_up: `[2, F, D]`, gate first; of experts `[X, 2, F, D]`.
      gate_up_bias: `[2, F]` or None.
      down: `[D, F]`; of experts `[X, D, F]`.
      down_bias: `[D]` or None.
      router: `[X, D]`, where the block is a mixture of X experts, or None.
    """

    attn_norm: jax.Array
    qkv: jax.Array
    out: jax.Array
    mlp_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array
    qkv_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    out_bias: jax.Array | None = None
    gate_up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    router: jax.Array | None = None


@struct.dataclass
class Params:
    """A decoder's weights.

    Attributes:
      embed: `[V, D]`.
      layers: `LayerParams` with a leading `L` on every leaf, or a tuple of L of them
        (`unstack`): the first is scanned over, the second unrolled.
      final_norm: `[D]`.
      lm_head: `[V, D]`, or None where the embedding is the head.
    """

    embed: jax.Array
    layers: LayerParams | tuple[LayerParams, ...]
    final_norm: jax.Array
    lm_head: jax.Array | None = None

    @property
    def head(self) -> jax.Array:
        """`[V, D]`, the weights that turn features into logits."""
        return self.embed if self.lm_head is None else self.lm_head


def describe(cfg: model_config.ModelConfig) -> Params:
    """Describe every leaf of `cfg`'s weights as a `Weight`, layers stacked."""
    d, f, h, v = cfg.d_model, cfg.d_ff, cfg.head_dim, cfg.vocab_size
    k, g = cfg.num_kv_heads, cfg.heads_per_kv

    # Stacked over L, so that one program walks them all.
    def layer(shape, axes, init, fan_in=1):
        return Weight((cfg.num_layers, *shape), ("layer", *axes), init, fan_in)

    # The kv heads' axis is the one that devices split: G + 2 and H stay whole.
    heads = (k, g + 2, h)
    # Experts stand side by side, and devices may have some of them each.
    experts = cfg.experts
    f = f if experts is None else experts.d_ff
    each = () if experts is None else (experts.num,)
    each_axes = ("expert",) * len(each)
    head_axes = ("kv_heads", None, None)
    # Norms of queries and of keys are for one head, or for all of them together.
    query = key = ((h,), (None,))
    if cfg.qk_norm_joint:
        query, key = ((k, g, h), head_axes), ((k, h), head_axes[:2])
    layers = LayerParams(
        attn_norm=layer((d,), (None,), "ones"),
        qkv=layer((*heads, d), (*head_axes, "embed"), "normal", d),
        out=layer((d, k, g, h), ("embed", *head_axes), "normal", k * g * h),
        mlp_norm=layer((d,), (None,), "ones"),
        gate_up=layer(
            (*each, 2, f, d), (*each_axes, None, "mlp", "embed"), "normal", d
        ),
        down=layer((*each, d, f), (*each_axes, "embed", "mlp"), "normal", f),
        qkv_bias=layer(heads, head_axes, "zeros") if cfg.qkv_bias else None,
        q_norm=layer(*query, "ones") if cfg.qk_norm else None,
        k_norm=layer(*key, "ones") if cfg.qk_norm else None,
        out_bias=layer((d,), (None,), "zeros") if cfg.out_bias else None,
        gate_up_bias=(layer((2, f), (None, "mlp"), "zeros") if cfg.mlp_bias else None),
        down_bias=layer((d,), (None,), "zeros") if cfg.mlp_bias else None,
        router=layer((*each, d), (None, "embed"), "normal", d) if experts else None,
    )
    table = Weight((v, d), ("vocab", "embed"), "normal", d)
    return Params(
        embed=table,
        layers=layers,
        final_norm=Weight((d,), (None,), "ones"),
        lm_head=None if cfg.tie_embeddings else table,
    )


def init(cfg: model_config.ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Draw random weights; a leaf's draw depends on its place, not on the others."""
    return draw(describe(cfg), key, dtype)


def draw(described: _Tree, key: jax.Array, dtype=jnp.float32) -> _Tree:
    """Draw a tree of random leaves from one of `Weight`s."""
    leaves, treedef = jax.tree.flatten(described)

    # By its place alone: a leaf added behind leaves the others' draws as they are.
    def one(i: int, weight: Weight) -> jax.Array:
        if weight.init != "normal":
            value = {"zeros": 0, "ones": 1}[weight.init]
            return jnp.full(weight.shape, value, dtype)
        scale = 1.0 / math.sqrt(weight.fan_in)
        noise = jax.random.normal(jax.random.fold_in(key, i), weight.shape)
        return (noise * scale).astype(dtype)

    return jax.tree.unflatten(treedef, [one(i, w) for i, w in enumerate(leaves)])


def abstract(cfg: model_config.ModelConfig, dtype=jnp.float32) -> Params:
    """Shapes and dtypes without arrays, for compiling and restoring."""
    return jax.tree.map(
        lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype), describe(cfg)
    )


def logical_axes(cfg: model_config.ModelConfig) -> Params:
    """Logical axis names of every leaf, as tuples."""
    return jax.tree.map(lambda weight: weight.axes, describe(cfg))


def count(cfg: model_config.ModelConfig) -> int:
    """Number of parameters, a tied head counted once."""
    return sum(math.prod(w.shape) for w in jax.tree.leaves(describe(cfg)))


def unstack(params: Params) -> Params:
    """Split stacked layers into a tuple.

    Slices of a stacked weight are copied at every use on CPUs, which doubles what a
    decode step reads; a tuple of arrays is read in place.
    """
    if isinstance(params.layers, tuple):
        return params
    indices = range(params.layers.attn_norm.shape[0])
    layers = (jax.tree.map(lambda leaf, i=i: leaf[i], params.layers) for i in indices)
    return params.replace(layers=tuple(layers))
