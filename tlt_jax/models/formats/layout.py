"""The correspondence between named tensors of a file and the leaves of `Params`.

A file holds one tensor per projection and layer; `Params` fuses projections and stacks
layers. `layout` says for every leaf which tensors fill which block of it; readers and
writers of all formats follow this one table.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params

# What a role is called in Hugging Face directories and in GGUF files: tables and norms
# outside of the layers, norms in them, and projections, which may have a bias.
_OUTSIDE = {
    "embed": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
}
_NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
}
_PROJECTIONS = {
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "out": ("self_attn.o_proj", "attn_output"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
# Those of a mixture. Hugging Face directories have a tensor for each expert, its number
# in the second brackets; GGUF files one for all experts of a layer.
_EXPERTS = {
    "router": ("mlp.gate", "ffn_gate_inp"),
    "expert_gate": ("mlp.experts.{}.gate_proj", "ffn_gate_exps"),
    "expert_up": ("mlp.experts.{}.up_proj", "ffn_up_exps"),
    "expert_down": ("mlp.experts.{}.down_proj", "ffn_down_exps"),
}


def _names(form: int, layer: str) -> dict[str, str]:
    """Name the tensor of every role in one of the forms."""
    names = {role: f"{own[form]}.weight" for role, own in _OUTSIDE.items()}
    for role, own in (_NORMS | _PROJECTIONS | _EXPERTS).items():
        names[role] = f"{layer}.{own[form]}.weight"
    for role, own in _PROJECTIONS.items():
        names[f"{role}_bias"] = f"{layer}.{own[form]}.bias"
    return names


# `{}` stands for the layer.
HF_NAMES, GGUF_NAMES = _names(0, "model.layers.{}"), _names(1, "blk.{}")
# What families call otherwise in Hugging Face directories.
_MIXTRAL = {
    "router": "gate",
    "expert_gate": "experts.{}.w1",
    "expert_up": "experts.{}.w3",
    "expert_down": "experts.{}.w2",
}
_OWN_NAMES = {
    "mixtral": {
        role: f"model.layers.{{}}.block_sparse_moe.{name}.weight"
        for role, name in _MIXTRAL.items()
    }
}


def hf_names(cfg: model_config.ModelConfig) -> dict[str, str]:
    """Name every role's tensor as Hugging Face directories of the family do."""
    return HF_NAMES | _OWN_NAMES.get(cfg.family, {})


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a file and the block of a leaf that it fills.

    Attributes:
      name: of the tensor.
      groups: for each axis of the tensor, the axes of the leaf that it flattens, in
        order; all together they are the block's shape.
      start: of the block in the leaf.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    start: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return tuple(math.prod(group) for group in self.groups)

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of the block in the leaf."""
        return sum(self.groups, ())


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of `Params`: its shape and the tensors that tile it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Source(Protocol):
    """Named tensors that can be read in part."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice with explicit bounds."""


def layout(
    cfg: model_config.ModelConfig, names: Mapping[str, str]
) -> model_params.Params:
    """Describe which named tensors fill every leaf, as `Params` of `Leaf`.

    See `HF_NAMES` for `names`; layers are stacked.
    """
    weights = model_params.describe(cfg)
    d, f, h = cfg.d_model, cfg.d_ff, cfg.head_dim
    k, g = cfg.num_kv_heads, cfg.heads_per_kv

    def leaf(weight, *parts):
        if weight is None:
            return None
        pieces = [
            Piece(names[role].format(i), ((1, *groups[0]), *groups[1:]), (i, *start))
            for i in range(cfg.num_layers)
            for role, groups, start in parts
        ]
        return Leaf(weight.shape, tuple(pieces))

    def vector(weight, role, size):
        return leaf(weight, (role, ((size,),), (0,)))

    def norm(weight, role):
        # Of a head, or of all heads one after the other.
        shape = weight.shape[1:] if weight else ()
        return leaf(weight, (role, (shape,), (0,) * len(shape)))

    def table(weight, role):
        if weight is None:
            return None
        groups, start = tuple((n,) for n in weight.shape), (0,) * len(weight.shape)
        return Leaf(weight.shape, (Piece(names[role], groups, start),))

    def heads(weight, suffix, last, start):
        def part(role, count, offset):
            return role + suffix, ((k, count, h), *last), (0, offset, 0, *start)

        return leaf(weight, part("q", g, 0), part("k", 1, g), part("v", 1, g + 1))

    layers = weights.layers
    if cfg.experts is None:
        blocks = dict(
            gate_up=leaf(
                layers.gate_up,
                ("gate", ((1, f), (d,)), (0, 0, 0)),
                ("up", ((1, f), (d,)), (1, 0, 0)),
            ),
            gate_up_bias=leaf(
                layers.gate_up_bias,
                ("gate_bias", ((1, f),), (0, 0)),
                ("up_bias", ((1, f),), (1, 0)),
            ),
            down=leaf(layers.down, ("down", ((d,), (f,)), (0, 0))),
            down_bias=vector(layers.down_bias, "down_bias", d),
        )
    else:
        blocks = _expert_blocks(cfg, layers, names)
    return model_params.Params(
        embed=table(weights.embed, "embed"),
        layers=model_params.LayerParams(
            attn_norm=vector(layers.attn_norm, "attn_norm", d),
            qkv=heads(layers.qkv, "", ((d,),), (0,)),
            qkv_bias=heads(layers.qkv_bias, "_bias", (), ()),
            q_norm=norm(layers.q_norm, "q_norm"),
            k_norm=norm(layers.k_norm, "k_norm"),
            out=leaf(layers.out, ("out", ((d,), (k, g, h)), (0, 0, 0, 0))),
            out_bias=vector(layers.out_bias, "out_bias", d),
            mlp_norm=vector(layers.mlp_norm, "mlp_norm", d),
            **blocks,
        ),
        final_norm=table(weights.final_norm, "final_norm"),
        lm_head=table(weights.lm_head, "lm_head"),
    )


def _expert_blocks(
    cfg: model_config.ModelConfig,
    layers: model_params.LayerParams,
    names: Mapping[str, str],
) -> dict[str, Leaf]:
    """Describe the leaves of a mixture: a tensor per expert, or one for all."""
    d, f, num = cfg.d_model, cfg.experts.d_ff, cfg.experts.num
    is_apart = names["expert_gate"].count("{}") == 2

    def pieces(i, role, groups, start):
        if not is_apart:
            yield Piece(names[role].format(i), ((1, num), *groups), (i, 0, *start))
            return
        for x in range(num):
            own = ((1, 1, *groups[0]), *groups[1:])
            yield Piece(names[role].format(i, x), own, (i, x, *start))

    def leaf(weight, *parts):
        every = [
            piece
            for i in range(cfg.num_layers)
            for part in parts
            for piece in pieces(i, *part)
        ]
        return Leaf(weight.shape, tuple(every))

    router = [
        Piece(names["router"].format(i), ((1, num), (d,)), (i, 0, 0))
        for i in range(cfg.num_layers)
    ]
    return dict(
        gate_up=leaf(
            layers.gate_up,
            ("expert_gate", ((1, f), (d,)), (0, 0, 0)),
            ("expert_up", ((1, f), (d,)), (1, 0, 0)),
        ),
        down=leaf(layers.down, ("expert_down", ((d,), (f,)), (0, 0))),
        router=Leaf(layers.router.shape, tuple(router)),
    )


def assemble(
    leaves: model_params.Params,
    source: Source,
    dtype=jnp.float32,
    shardings: model_params.Params | None = None,
) -> model_params.Params:
    """Fill every leaf of `leaves` from `source`.

    Raises:
      ValueError: naming tensors that are missing, surplus or misshapen.
    """
    _check_names(leaves, source)
    if shardings is None:
        return jax.tree.map(
            lambda leaf: jnp.asarray(
                read(leaf, source, tuple(slice(0, n) for n in leaf.shape), dtype)
            ),
            leaves,
        )

    def place(leaf: Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        # Replicas ask for the same slice once per device.
        read_once = functools.cache(
            lambda bounds: read(
                leaf, source, tuple(slice(*bound) for bound in bounds), dtype
            )
        )

        def callback(index: tuple[slice, ...]) -> np.ndarray:
            bounds = zip(index, leaf.shape, strict=True)
            return read_once(tuple(s.indices(n)[:2] for s, n in bounds))

        return jax.make_array_from_callback(leaf.shape, sharding, callback)

    return jax.tree.map(place, leaves, shardings)


def some(names: list[str], limit: int = 6) -> str:
    """List some of `names` for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read(leaf: Leaf, source: Source, index: tuple[slice, ...], dtype) -> np.ndarray:
    """Read `leaf[index]` and nothing else of the tensors; `index` has bounds."""
    starts, stops = np.array([(s.start, s.stop) for s in index]).T
    result = np.empty(stops - starts, jnp.dtype(dtype))
    for piece in leaf.pieces:
        low = np.maximum(starts, piece.start)
        high = np.minimum(stops, np.add(piece.start, piece.block))
        if np.all(low < high):
            inside = tuple(map(slice, low - starts, high - starts))
            bounds = np.subtract((low, high), piece.start).T.tolist()
            result[inside] = _read_block(piece, source, bounds)
    return result


def _read_block(piece: Piece, source: Source, bounds: list[list[int]]) -> np.ndarray:
    """Read a sub-block: files are sliced along the first long axis of each group."""
    file_index, shape, rest, axis = [], [], [], 0
    for group in piece.groups:
        own = bounds[axis : axis + len(group)]
        axis += len(group)
        lead = next((i for i, n in enumerate(group) if n > 1), len(group) - 1)
        inner = math.prod(group[lead + 1 :])
        low, high = own[lead]
        file_index.append(slice(low * inner, high * inner))
        shape += [*group[:lead], high - low, *group[lead + 1 :]]
        rest += [slice(None)] * (lead + 1) + [slice(*b) for b in own[lead + 1 :]]
    block = source.read(piece.name, tuple(file_index))
    if not np.isfinite(block).all():
        raise ValueError(
            f"{piece.name} holds weights that are not finite: the file is damaged, or "
            "of a training that diverged."
        )
    return block.reshape(shape)[tuple(rest)]


def _check_names(leaves: model_params.Params, source: Source) -> None:
    pieces = [piece for leaf in jax.tree.leaves(leaves) for piece in leaf.pieces]
    expected = {piece.name: piece.shape for piece in pieces}
    found = source.shapes()
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    if missing or surplus:
        kinds = {"missing": missing, "surplus": surplus}
        listed = "; ".join(f"{kind} {some(n)}" for kind, n in kinds.items() if n)
        raise ValueError(
            f"the weights are not those of the configuration: {listed}. Check that "
            "config.json belongs to these files."
        )
    wrong = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if tuple(found[name]) != shape
    ]
    if wrong:
        raise ValueError(
            f"tensors with shapes that the configuration does not have: {some(wrong)}."
        )
