"""The `config.json` of published drafters: every key read, written, or refused by name.

What the layouts are stands in `drafter_layouts`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter, layouts
from tlt_jax.models.formats import hf_config, hf_settings, json_file

# A Llama config leaves out what has these values.
_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "num_hidden_layers": 1,
}
# Keys besides a Llama layer's own, read below; others are refused by name.
_KEYS = frozenset(
    "architectures model_type draft_vocab_size eagle_config target_hidden_size bias "
    "norm_before_residual eagle_aux_hidden_state_layer_ids tlt_jax "
    "target_vocab_size".split()
)
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
# Settings of variants that are not computed here, and the value that turns them off.
_OFF: Mapping[str, Any] = {
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "embed_requires_grad": False,
    "add_para_norm": False,
}


def to_config(
    cfg: drafter.DrafterConfig,
    layout: layouts.Layout,
    target: model_config.ModelConfig,
    *,
    dtype: str,
    verifier: str,
    num_speculative_tokens: int,
) -> dict[str, Any]:
    """Write the `config.json` of a layout.

    Args:
      cfg: the drafter, checked by `check_expressible`.
      layout: which.
      target: the model that it was made for.
      dtype: of the tensors beside it.
      verifier: name or directory of the target, for `speculators`.
      num_speculative_tokens: tokens that vLLM shall draft, for `speculators`.
    """
    c = cfg.layer
    layer = hf_config.to_hf(
        dataclasses.replace(c, family="llama", tie_embeddings=False), dtype
    )
    layer["pad_token_id"] = c.pad_id
    own = {"tlt_jax": {"target": cfg.target, "max_length": cfg.max_length}}
    named = {"architectures": [layouts.CLASS_OF[layout]]}
    if layout == "eagle":
        return layer | named | {"bias": cfg.join_bias} | own
    if layout == "eagle3":
        layer |= named | {"draft_vocab_size": cfg.num_draft_tokens}
        if cfg.feature_layers != layouts.published(target.num_layers):
            layer["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": list(cfg.feature_layers),
                "use_aux_hidden_state": True,
            }
        return layer | own
    del layer["architectures"]
    verifier_class = hf_config.architecture(target)
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": num_speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        **named,
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": [verifier_class]},
        },
        "draft_vocab_size": cfg.num_draft_tokens,
        "norm_before_residual": cfg.norm_before_residual,
        "target_hidden_size": None,
        # vLLM names what goes into a layer.
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in cfg.feature_layers],
        "transformer_layer_config": layer,
        "torch_dtype": dtype,
        **own,
    }


def layout_of(config: Mapping[str, Any]) -> layouts.Layout | None:
    """Tell a layout by its `config.json`; None: it is none of them.

    EAGLE's own checkpoints say `LlamaForCausalLM`; of these the ones with a draft
    vocabulary are EAGLE-3's.
    """
    if "speculators_model_type" in config:
        return "speculators"
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        return None
    if named[0] in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"):
        return "eagle3"
    if named[0] in ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM"):
        return "eagle"
    if named[0] == "LlamaForCausalLM" and config.get("num_hidden_layers") == 1:
        return "eagle3" if config.get("draft_vocab_size") else "eagle"
    return None


def from_config(
    config: Mapping[str, Any],
    layout: layouts.Layout,
    target: model_config.ModelConfig,
    present: frozenset[str],
) -> drafter.DrafterConfig:
    """Read a drafter's description from a `config.json`.

    Args:
      config: parsed.
      layout: of `layout_of`.
      target: the model that shall verify.
      present: names of the tensors beside it.

    Raises:
      ValueError: naming a key or value that is not computed here, or that does not fit
        the target.
    """
    outer = dict(config)
    if layout == "speculators":
        kind = outer["speculators_model_type"]
        if kind != "eagle3":
            raise ValueError(
                f"speculators_model_type={json_file.show(kind)} is not computed here: "
                "eagle3 is."
            )
        inner = outer.get("transformer_layer_config")
        if not isinstance(inner, Mapping):
            raise ValueError("transformer_layer_config is missing: download it again.")
        if inner.get("model_type", "llama") != "llama":
            raise ValueError(
                "transformer_layer_config has model_type="
                f"{json_file.show(inner['model_type'])}: "
                "drafters with a llama layer are computed here."
            )
    else:
        inner = outer
    for key in ("eagle_config", "tlt_jax"):
        if not isinstance(outer.get(key), Mapping | None):
            raise ValueError(
                f"config.json has {key}={json_file.show(outer[key])}, which is no JSON "
                "object: download it again."
            )
    for key, off in _OFF.items():
        for part in (outer, inner, outer.get("eagle_config") or {}):
            if part.get(key, off) not in (off, None):
                raise ValueError(
                    f"config.json has {key}={json_file.show(part[key])}, which is not "
                    f"computed here: a drafter with {key}={off} is."
                )
    layer = hf_config.from_hf(_plain_layer(inner))
    _check_layer(layer, target, outer)
    known = outer.get("tlt_jax") or {}
    here = drafter.identify(target)
    if known.get("target", here) != here:
        raise ValueError(
            "this is a drafter of another target, "
            f"{json_file.word(known['target'])}, not of {here}: give the model that it "
            "was trained for."
        )
    made = drafter.of_target(
        target,
        feature_layers=() if layout == "eagle" else _layers(outer, layout, target),
        architecture=layouts.ARCHITECTURE_OF[layout],
        max_length=hf_settings.integer(known, "max_length", 0, at_least=0),
    )
    by_role = {role: name for name, (role, _) in layouts.TENSORS[layout].items()}
    size = hf_settings.integer(outer, "draft_vocab_size", 0, at_least=0)
    is_speculators = layout == "speculators"
    normed = hf_settings.boolean(outer, "norm_before_residual", is_speculators)
    return dataclasses.replace(
        made,
        layer=dataclasses.replace(layer, num_layers=1),
        draft_vocab_size=size if by_role.get("d2t") in present else 0,
        join_bias=by_role.get("join_bias") in present,
        norm_before_residual=layout != "eagle" and normed,
        own_head=by_role.get("head") in present,
    )


def _plain_layer(inner: Mapping[str, Any]) -> dict[str, Any]:
    """Leave of a layout's config what a Llama model's has."""
    skipped = _KEYS | set(_OFF)
    if not inner.get("use_sliding_window"):
        skipped |= set(_WINDOWS)
    kept = {key: value for key, value in inner.items() if key not in skipped}
    return _DEFAULTS | kept | {"architectures": ["LlamaForCausalLM"]}


def _check_layer(layer, target, outer) -> None:
    wrong = []
    if layer.num_layers != 1:
        wrong.append(f"num_hidden_layers={layer.num_layers} (one is computed here)")
    for name in ("qkv_bias", "mlp_bias"):
        if getattr(layer, name):
            wrong.append(f"{name} (layers of drafters have none here)")
    if layer.tie_embeddings and not target.tie_embeddings:
        wrong.append("tie_word_embeddings=True (the target has a head of its own)")
    if layer.vocab_size != target.vocab_size:
        wrong.append(f"vocab_size={layer.vocab_size} (target: {target.vocab_size})")
    width = hf_settings.integer(outer, "target_hidden_size", layer.d_model)
    for name, size in (("hidden_size", layer.d_model), ("target_hidden_size", width)):
        if size != target.d_model:
            wrong.append(f"{name}={size} (target: {target.d_model})")
    if wrong:
        raise ValueError(
            f"config.json has {', '.join(wrong)}: give a drafter of this target, with "
            "one plain layer of its width."
        )


def _layers(outer, layout, target) -> tuple[int, ...]:
    """Which outputs are read, whatever convention the file has."""
    nested = outer.get("eagle_config") or {}
    if not hf_settings.boolean(nested, "use_aux_hidden_state", True):
        raise ValueError(
            "eagle_config has use_aux_hidden_state=False, which is not computed here: "
            "EAGLE-3 fuses three layers."
        )
    key = "eagle_aux_hidden_state_layer_ids"
    ids = outer.get(key) or nested.get(key)
    if not ids:
        return drafter.published_layers(target.num_layers)
    is_list = isinstance(ids, list) and all(type(i) is int for i in ids)
    shift = 0 if layout == "eagle3" and is_list and ids[0] == 1 else 1
    layers = tuple(i - shift for i in ids) if is_list else ()
    if len(layers) != 3 or min(layers) < 0 or max(layers) >= target.num_layers:
        raise ValueError(
            f"{key}={json_file.show(ids)} with a target of {target.num_layers} layers: "
            "three of its layers' outputs can be read."
        )
    return layers
