"""What `config.json` of Hugging Face models says of a mixture of experts."""

from collections.abc import Mapping
from typing import Any

from tlt_jax.models import config as model_config
from tlt_jax.models.formats import hf_settings

_COUNTS = frozenset("num_experts num_local_experts num_experts_per_tok".split())
# Keys that families have.
READ: Mapping[str, frozenset[str]] = {
    "qwen3_moe": _COUNTS | {"moe_intermediate_size", "norm_topk_prob"},
    "mixtral": _COUNTS,
    "olmoe": _COUNTS | {"norm_topk_prob"},
}
# What a file that does not say them means: experts, those of a token, their width.
_DEFAULTS = {
    "qwen3_moe": (128, 8, 768),
    "mixtral": (8, 2, None),
    "olmoe": (64, 8, None),
}


def from_hf(
    config: Mapping[str, Any], family: model_config.Family
) -> model_config.Experts | None:
    """Read the settings of a mixture; None where the family's blocks are dense.

    Raises:
      ValueError: naming a key whose value is not accepted.
    """
    if family not in model_config.MIXTURES:
        return None
    most = model_config.MOST
    read = hf_settings.integer
    # Releases of transformers write one name or the other, or both.
    names = [n for n in ("num_experts", "num_local_experts") if n in config]
    counts = {read(config, name, at_most=most["num_experts"]) for name in names}
    if len(counts) > 1:
        raise ValueError(
            f"num_experts={config['num_experts']} contradicts num_local_experts="
            f"{config['num_local_experts']}: remove the wrong one from config.json."
        )
    num, per_token, d_ff = _DEFAULTS[family]
    return model_config.Experts(
        num=counts.pop() if counts else num,
        per_token=read(config, "num_experts_per_tok", per_token),
        d_ff=read(config, _width_key(family), d_ff, at_most=most["d_ff"]),
        # Mixtral's softmax is over the chosen experts alone: the same as dividing by a
        # sum.
        normalised=family == "mixtral" or hf_settings.boolean(config, "norm_topk_prob"),
    )


def to_hf(cfg: model_config.ModelConfig) -> dict[str, Any]:
    """Write the entries of a mixture, over those that dense models have as well."""
    experts = cfg.experts
    entries = {
        _width_key(cfg.family): experts.d_ff,
        "num_experts_per_tok": experts.per_token,
    }
    if cfg.family == "mixtral":
        return entries | {"num_local_experts": experts.num, "sliding_window": None}
    entries |= {"num_experts": experts.num, "norm_topk_prob": experts.normalised}
    if cfg.family == "olmoe":
        return entries | {"clip_qkv": None}
    return entries | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": cfg.num_layers,
    }


def _width_key(family: model_config.Family) -> str:
    # Where no block is dense, the only width is that of an expert.
    return "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
