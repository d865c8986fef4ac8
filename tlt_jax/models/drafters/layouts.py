"""The published layouts of drafters: names, shapes and meaning of their tensors.

Facts, looked up in the loaders that read these layouts (November 2026):

- `eagle`: SGLang's `LlamaForCausalLMEagle`. The join has a bias that is random unless
  the file sets it, so it is always written. Embedding and head are the target's. (vLLM
  computes the same without the bias, and refuses a file that has one.)
- `eagle3`: SGLang's `LlamaForCausalLMEagle3`, vLLM's `Eagle3LlamaForCausalLM`. `d2t`
  holds target id minus draft id, `t2d` marks the proposed tokens among the target's.
- `speculators`: vLLM's format; EAGLE-3 with the layer called `layers.0` and its config
  below `transformer_layer_config`.

Which of the target's layers are read has two conventions. Without a list all loaders
take the inputs of layers 2, N/2 and N - 3, which are the outputs of the layers before.
vLLM's lists name inputs. SGLang's name outputs if they begin with 1, else inputs since
May 2026 and outputs before. We say outputs throughout.

What a layout has no key for is refused by name on the way out; what we do not compute,
on the way in. References: Li et al., EAGLE, 2024; Li et al., EAGLE-3, 2025.
"""

import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head

Layout = Literal["eagle", "eagle3", "speculators"]
LAYOUTS: tuple[Layout, ...] = typing.get_args(Layout)
ARCHITECTURE_OF: Mapping[Layout, drafter.Architecture] = dict(
    eagle="eagle", eagle3="eagle3", speculators="eagle3"
)
CLASS_OF: Mapping[Layout, str] = {
    "eagle": "LlamaForCausalLMEagle",
    "eagle3": "LlamaForCausalLMEagle3",
    "speculators": "Eagle3Speculator",
}

Spec = Mapping[str, tuple[str, tuple[str, ...]]]


def _layer(prefix: str, read: str) -> Spec:
    """Tensors of the decoder layer; `read` is what its attention is projected from."""
    return {
        f"{prefix}.self_attn.q_proj.weight": ("q", ("NH", read)),
        f"{prefix}.self_attn.k_proj.weight": ("k", ("KH", read)),
        f"{prefix}.self_attn.v_proj.weight": ("v", ("KH", read)),
        f"{prefix}.self_attn.o_proj.weight": ("out", ("D", "NH")),
        f"{prefix}.post_attention_layernorm.weight": ("mlp_norm", ("D",)),
        f"{prefix}.mlp.gate_proj.weight": ("gate", ("F", "D")),
        f"{prefix}.mlp.up_proj.weight": ("up", ("F", "D")),
        f"{prefix}.mlp.down_proj.weight": ("down", ("D", "F")),
    }


def _eagle3(prefix: str) -> Spec:
    return {
        "fc.weight": ("fuse", ("D", "3D")),
        f"{prefix}.input_layernorm.weight": ("attn_norm", ("D",)),
        f"{prefix}.hidden_norm.weight": ("feature_norm", ("D",)),
        **_layer(prefix, "2D"),
        "norm.weight": ("norm", ("D",)),
        "lm_head.weight": ("head", ("Vd", "D")),
        "d2t": ("d2t", ("Vd",)),
        "t2d": ("t2d", ("V",)),
    }


# Of each layout every tensor: what it is here, and its shape.
TENSORS: Mapping[Layout, Spec] = {
    "eagle": {
        "fc.weight": ("join", ("D", "2D")),
        "fc.bias": ("join_bias", ("D",)),
        **_layer("layers.0", "D"),
    },
    "eagle3": _eagle3("midlayer"),
    "speculators": _eagle3("layers.0"),
}
# What is the same array here, in the layer and beside it.
_SAME_OF_LAYER = ("out", "down", "mlp_norm", "attn_norm")
_SAME = ("join", "join_bias", "fuse", "norm", "feature_norm")
# What a file need not have.
OPTIONAL = frozenset({"join_bias", "head", "d2t", "t2d"})
# Copies of the target's, in whose place the loaders put the target's own.
NOT_READ: Mapping[Layout, frozenset[str]] = {
    "eagle": frozenset({"embed_tokens.weight", "lm_head.weight"}),
    "eagle3": frozenset({"embed_tokens.weight"}),
    "speculators": frozenset(
        {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    ),
}


def shapes(cfg: drafter.DrafterConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a layout, by name, optional ones included."""
    c = cfg.layer
    sizes = {
        "D": c.d_model,
        "2D": 2 * c.d_model,
        "3D": 3 * c.d_model,
        "F": c.d_ff,
        "NH": c.num_heads * c.head_dim,
        "KH": c.num_kv_heads * c.head_dim,
        "V": c.vocab_size,
        "Vd": cfg.num_draft_tokens,
    }
    return {
        name: tuple(sizes[letter] for letter in letters)
        for name, (_, letters) in TENSORS[layout].items()
    }


def check_expressible(
    cfg: drafter.DrafterConfig, layout: Layout, num_target_layers: int
) -> None:
    """Refuse a drafter that a layout's loader would compute otherwise.

    Args:
      cfg: the drafter.
      layout: which.
      num_target_layers: layers of the target.

    Raises:
      ValueError: naming what the layout has no place for, and the remedy.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: use one of {', '.join(LAYOUTS)}.")
    wanted, layers = ARCHITECTURE_OF[layout], cfg.feature_layers
    problem = None
    if cfg.architecture == "tlt":
        problem = (
            "architecture='tlt' divides token and features by their root mean square "
            "before they are joined, which no layout has a place for: train one with "
            f"drafter.architecture={wanted!r}, or give it out as it is "
            "(--drafter_layout=tlt)"
        )
    elif cfg.architecture == "block":
        problem = (
            "architecture='block' is computed nowhere else (DFlash's layers read the "
            "target's features without its tokens, and have no law of token by token): "
            f"train one with drafter.architecture={wanted!r}, or give it out as it is "
            "(--drafter_layout=tlt)"
        )
    elif cfg.architecture != wanted:
        fitting = [x for x in LAYOUTS if ARCHITECTURE_OF[x] == cfg.architecture]
        problem = (
            f"architecture={cfg.architecture!r} is another one: use the layout "
            f"{' or '.join(fitting)}"
        )
    elif cfg.draft_vocab_size and layout == "eagle":
        problem = (
            f"draft_vocab_size={cfg.draft_vocab_size} needs a list of tokens, which it "
            "has no tensor for: train with drafter.draft_vocab_size=0"
        )
    elif cfg.norm_before_residual and layout == "eagle3":
        problem = (
            "norm_before_residual=True is not computed by SGLang: use the layout "
            "speculators"
        )
    elif layers != tuple(sorted(set(layers))):
        problem = f"feature_layers={layers} do not rise: vLLM sorts them"
    elif (
        layout == "eagle3" and layers[0] != 1 and layers != published(num_target_layers)
    ):
        problem = (
            f"feature_layers={layers} mean other layers to SGLang from version to "
            "version: use the layout speculators, or train with "
            "drafter.features='low_mid_high' or with a first layer of 1"
        )
    if problem is not None:
        raise ValueError(f"this drafter does not fit the layout {layout}: {problem}.")


def to_tensors(
    params: drafter.DrafterParams,
    cfg: drafter.DrafterConfig,
    layout: Layout,
    head: Any = None,
) -> dict[str, np.ndarray]:
    """Write a drafter's weights as named tensors of a layout, of their own types.

    Args:
      params: with `draft_ids` where the vocabulary is reduced.
      cfg: the drafter.
      layout: checked by `check_expressible`.
      head: `[Vd, D]` of the target, for a drafter that has none of its own; engines
        other than this one ask for it.
    """
    c, layer = cfg.layer, jax.tree.map(np.asarray, params.layer)
    group = c.heads_per_kv
    qkv = layer.qkv.reshape(*layer.qkv.shape[:3], -1)
    values = {
        "q": qkv[:, :group],
        "k": qkv[:, group],
        "v": qkv[:, group + 1],
        "gate": layer.gate_up[0],
        "up": layer.gate_up[1],
        **{name: getattr(layer, name) for name in _SAME_OF_LAYER},
        **{name: getattr(params, name) for name in _SAME},
        "head": drafter_head.head_of(params, head),
    }
    if layout == "eagle" and params.join_bias is None:
        values["join_bias"] = np.zeros(c.d_model, np.asarray(params.join).dtype)
    if cfg.draft_vocab_size:
        ids = np.asarray(params.draft_ids, np.int64)
        values["d2t"] = ids - np.arange(len(ids))
        values["t2d"] = np.isin(np.arange(c.vocab_size), ids)
    wanted = shapes(cfg, layout)
    return {
        name: np.ascontiguousarray(np.asarray(values[role]).reshape(wanted[name]))
        for name, (role, _) in TENSORS[layout].items()
        if values.get(role) is not None
    }


def from_tensors(
    tensors: Mapping[str, np.ndarray], cfg: drafter.DrafterConfig, layout: Layout
) -> drafter.DrafterParams:
    """Read a drafter's weights from tensors of a layout, bit for bit.

    Args:
      tensors: by name, without those of `NOT_READ`.
      cfg: the drafter.
      layout: whose names they have.

    Raises:
      ValueError: naming tensors that are missing, surplus or misshapen, or a draft
        vocabulary that contradicts itself.
    """
    spec, wanted = TENSORS[layout], shapes(cfg, layout)
    needed = {
        name
        for name, (role, _) in spec.items()
        if role not in OPTIONAL
        or (role == "d2t" and cfg.draft_vocab_size)
        or (role == "join_bias" and cfg.join_bias)
        or (role == "head" and cfg.own_head)
    }
    wrong = [f"{name} is missing" for name in sorted(needed - set(tensors))]
    surplus = sorted(set(tensors) - set(spec))
    wrong += [f"{name} has no meaning here" for name in surplus]
    wrong += [
        f"{name} is {tensors[name].shape}, not {wanted[name]}"
        for name in spec
        if name in tensors and tensors[name].shape != wanted[name]
    ]
    wrong += [
        f"{name} is {tensors[name].dtype}"
        for name, (role, _) in spec.items()
        if name in tensors and not _is_of_kind(tensors[name], role)
    ]
    if wrong:
        more = f" ({len(wrong)} in all)" if len(wrong) > 4 else ""
        raise ValueError(
            f"the tensors are not those of the layout {layout} with this config.json: "
            f"{'; '.join(wrong[:4])}{more}. Check that both belong together."
        )
    by_role = {role: tensors.get(name) for name, (role, _) in spec.items()}
    c = cfg.layer
    heads = (c.num_kv_heads, -1, c.head_dim)
    read = by_role["q"].shape[1]
    layer = model_params.LayerParams(
        attn_norm=by_role.get("attn_norm"),
        qkv=np.concatenate([by_role[x].reshape(*heads, read) for x in "qkv"], axis=1),
        out=by_role["out"].reshape(-1, c.num_kv_heads, c.heads_per_kv, c.head_dim),
        mlp_norm=by_role["mlp_norm"],
        gate_up=np.stack([by_role["gate"], by_role["up"]]),
        down=by_role["down"],
    )
    ids = None
    if cfg.draft_vocab_size:
        ids = by_role["d2t"].astype(np.int64) + np.arange(cfg.draft_vocab_size)
        _check_vocabulary(ids, by_role.get("t2d"), c.vocab_size)
    return drafter.DrafterParams(
        layer=layer,
        draft_ids=None if ids is None else ids.astype(np.int32),
        **{name: by_role.get(name) for name in (*_SAME, "head")},
    )


def published(num_layers: int) -> tuple[int, ...] | None:
    """Return the layers that are read where none are named; None: too few layers."""
    try:
        return drafter.published_layers(num_layers)
    except ValueError:
        return None


def _is_of_kind(array: np.ndarray, role: str) -> bool:
    """Whether numbers of this type can be what the role says."""
    if role in ("d2t", "t2d"):
        return array.dtype.kind in ("iu" if role == "d2t" else "biu")
    return jnp.issubdtype(array.dtype, jnp.floating)


def _check_vocabulary(ids, marked, vocab_size: int) -> None:
    if np.any(np.diff(ids) <= 0) or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(
            f"d2t names tokens that do not rise within [0, {vocab_size}): it is "
            "damaged, or of another vocabulary."
        )
    if marked is not None and not np.array_equal(np.flatnonzero(marked), ids):
        raise ValueError("t2d and d2t name different tokens: download both again.")
