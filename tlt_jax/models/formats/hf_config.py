"""Translation between `ModelConfig` and the `config.json` of Hugging Face models.

A key is read, or known not to change what is computed, or refused by name: a setting
that is ignored gives a model that is almost right.
"""

import os
from collections.abc import Mapping
from typing import Any

from tlt_jax.models import config as model_config
from tlt_jax.models.formats import hf_experts, hf_rope, hf_settings, json_file

ARCHITECTURES: Mapping[str, model_config.Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
}

_READ = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size "
    "num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps "
    "max_position_embeddings tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters attention_bias bos_token_id eos_token_id pad_token_id".split()
)
_WINDOW_KEYS = frozenset(
    "use_sliding_window sliding_window max_window_layers layer_types".split()
)
_READ_BY_FAMILY = {
    "llama": frozenset({"mlp_bias"}),
    "qwen2": _WINDOW_KEYS,
    "qwen3": _WINDOW_KEYS,
    "qwen3_moe": _WINDOW_KEYS | hf_experts.READ["qwen3_moe"],
    "mixtral": hf_experts.READ["mixtral"],
    "olmoe": hf_experts.READ["olmoe"],
}
# How those who made a model sample from it.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

# Metadata, hints to other programs, and defaults of sampling: no effect on the logits.
_METADATA = frozenset(
    "transformers_version dtype torch_dtype initializer_range use_cache "
    "_name_or_path name_or_path _commit_hash _attn_implementation_autoset "
    "attn_implementation return_dict use_return_dict output_attentions "
    "output_hidden_states torchscript use_bfloat16 finetuning_task task_specific_params"
    " id2label label2id num_labels problem_type prefix tokenizer_class sep_token_id "
    "decoder_start_token_id is_llama_config transformers.js_config unsloth_fixed "
    "unsloth_version model_max_length max_length min_length do_sample early_stopping "
    "num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens "
    # What other trainers add to their loss.
    "output_router_logits router_aux_loss_coef".split()
)

_MOST_EOS = 64
_QWEN3 = ("qwen3", "qwen3_moe")
_NORMED = (*_QWEN3, "olmoe")
_WINDOWED = ("qwen2", "qwen3", "qwen3_moe")
_MAX_POSITIONS = {"llama": 2048, "olmoe": 4096}
# Keys that other values than these would make compute something else.
_ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "only SwiGLU blocks are computed"),
    "attention_dropout": ((0, None), "training here has no dropout; set it to 0.0"),
    "pretraining_tp": ((1, None), "products are not split; set it to 1"),
    "partial_rotary_factor": ((1, None), "every dimension of a head is rotated"),
    "rope_interleaved": ((False, None), "halves are rotated, not neighbours"),
    "use_mrope": ((False, None), "positions have one axis"),
    "quantization_config": ((None,), "give unquantised weights or a GGUF file"),
    "compression_config": ((None,), "give unquantised weights or a GGUF file"),
    "auto_map": ((None,), "code that comes with weights is never run"),
    "is_encoder_decoder": ((False, None), "decoders only"),
    "is_decoder": ((False, True, None), ""),
    "add_cross_attention": ((False, None), "decoders only"),
    "cross_attention_hidden_size": ((None,), "decoders only"),
    "tie_encoder_decoder": ((False, None), "decoders only"),
    "chunk_size_feed_forward": ((0, None), "set it to 0"),
    "router_jitter_noise": ((0, None), "training here has no noise; set it to 0.0"),
    "decoder_sparse_step": (
        (1, None),
        "every layer is a mixture, or none; set it to 1",
    ),
    "mlp_only_layers": (([], None), "every layer is a mixture, or none; set it to []"),
    **{
        key: ((0, None), "experts that every token passes are not computed")
        for key in ("shared_expert_intermediate_size", "n_shared_experts")
    },
    **{
        key: ((None,), "the router is a softmax over all experts, without groups")
        for key in ("scoring_func", "topk_method", "n_group", "topk_group")
    },
    "pruned_heads": (({}, None), "heads are all computed"),
    "clip_qkv": ((None,), "queries, keys and values are not clipped"),
}


def from_hf(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> model_config.ModelConfig:
    """Read a `config.json`.

    Both forms of the rotary settings are read: nested `rope_parameters` (transformers
    5) and `rope_theta` with `rope_scaling` (transformers 4).

    Args:
      config: the parsed `config.json`.
      generation_config: the parsed `generation_config.json`, if there is one; its
        special tokens take precedence, as they do in `transformers`' generation.

    Raises:
      ValueError: naming an architecture, key or value that is not computed here.
    """
    family = _family(config)
    _refuse_unknown(config, family)
    most = model_config.MOST
    num_layers = hf_settings.integer(
        config, "num_hidden_layers", at_most=most["num_layers"]
    )
    num_heads = hf_settings.integer(config, "num_attention_heads")
    d_model = hf_settings.integer(config, "hidden_size", at_most=most["d_model"])
    if config.get("head_dim") is not None:
        head_dim = hf_settings.integer(config, "head_dim")
    elif family in _QWEN3:
        head_dim = 128  # the family's default does not follow from d_model
    elif d_model % num_heads:
        raise ValueError(
            f"hidden_size={d_model} is not a multiple of num_attention_heads="
            f"{num_heads} and head_dim is not given: give head_dim."
        )
    else:
        head_dim = d_model // num_heads
    max_positions = hf_settings.integer(
        config, "max_position_embeddings", _MAX_POSITIONS.get(family, 32768)
    )
    rope_theta, rope_scaling = hf_rope.from_hf(config, max_positions)
    sliding_window, windowed_layers = _windows(config, family, num_layers)
    attention_bias = hf_settings.boolean(config, "attention_bias")
    if family == "olmoe" and head_dim * num_heads != d_model:
        raise ValueError(
            f"head_dim={head_dim} with hidden_size={d_model} and num_attention_heads="
            f"{num_heads}: the heads of OlmoeForCausalLM divide the hidden size; "
            "remove head_dim."
        )
    if family == "mixtral" and attention_bias:
        raise ValueError(
            "attention_bias=true is not a setting of MixtralForCausalLM, which has no "
            "biases: remove the key."
        )
    if family == "qwen2" and config.get("attention_bias") is False:
        raise ValueError(
            "attention_bias=false is not a setting of Qwen2ForCausalLM, which always "
            "has biases on q, k and v: remove the key."
        )
    special = {**_special_tokens(config), **_special_tokens(generation_config or {})}
    return model_config.ModelConfig(
        family=family,
        vocab_size=hf_settings.integer(config, "vocab_size"),
        num_layers=num_layers,
        d_model=d_model,
        d_ff=hf_settings.integer(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=hf_settings.integer(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        tie_embeddings=hf_settings.boolean(config, "tie_word_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family != "qwen2" and attention_bias,
        mlp_bias=hf_settings.boolean(config, "mlp_bias"),
        qk_norm=family in _NORMED,
        qk_norm_joint=family == "olmoe",
        rms_norm_eps=hf_settings.positive(config, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=sliding_window,
        windowed_layers=windowed_layers,
        max_positions=max_positions,
        experts=hf_experts.from_hf(config, family),
        **special,
    )


def read(directory: str | os.PathLike) -> model_config.ModelConfig:
    """Read `config.json` and, where present, `generation_config.json` of a directory.

    Raises:
      ValueError: if there is no `config.json`, if it is no JSON, or as in `from_hf`.
    """
    config = read_json(os.path.join(directory, "config.json"))
    generation = os.path.join(directory, "generation_config.json")
    return from_hf(config, read_json(generation) if os.path.exists(generation) else {})


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      ValueError: naming the file, if it is missing or does not hold an object.
    """
    try:
        return json_file.read(path, "download it again")
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: a model directory holds config.json, "
            "model.safetensors (or its index and shards) and tokenizer.json."
        ) from None


def to_hf(cfg: model_config.ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Write a `config.json` that `transformers` 4 and 5 load as the same model.

    Args:
      cfg: the model.
      dtype: of the weights beside it, `float32`, `bfloat16` or `float16`.

    Raises:
      ValueError: if no class of `transformers` computes this combination.
    """
    _check_exportable(cfg)
    rope = hf_rope.to_hf(cfg.rope_scaling)
    config = {
        "architectures": [architecture(cfg)],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.rms_norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **rope},
        "attention_dropout": 0.0,
        **to_hf_generation(cfg),
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if cfg.family not in ("qwen2", "mixtral"):
        config["attention_bias"] = cfg.qkv_bias
    if cfg.family == "llama":
        config["mlp_bias"] = cfg.mlp_bias
        return config
    if cfg.experts is not None:
        return config | hf_experts.to_hf(cfg)
    windowed = cfg.windowed_layers or (False,) * cfg.num_layers
    first = windowed.index(True) if any(windowed) else cfg.num_layers
    return config | {
        "use_sliding_window": any(windowed),
        "sliding_window": cfg.sliding_window if any(windowed) else None,
        "max_window_layers": first,
        "layer_types": [
            "sliding_attention" if w else "full_attention" for w in windowed
        ],
    }


def read_sampling(directory: str | os.PathLike) -> dict[str, float]:
    """Read how the model's makers sample from it, from `generation_config.json`.

    Returns:
      Those of `temperature`, `top_k`, `top_p` and `min_p` that are given; temperature 0
      where sampling is switched off; nothing where nothing is said.

    Raises:
      ValueError: the file is no JSON.
    """
    path = os.path.join(directory, "generation_config.json")
    values = read_json(path) if os.path.exists(path) else {}
    if values.get("do_sample") is False:
        return {"temperature": 0.0}
    named = {key: values.get(key) for key in _SAMPLING}
    return {
        key: value
        for key, value in named.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def architecture(cfg: model_config.ModelConfig) -> str:
    """Name the Hugging Face class that computes a model of this family."""
    return next(name for name, f in ARCHITECTURES.items() if f == cfg.family)


def to_hf_generation(cfg: model_config.ModelConfig) -> dict[str, Any]:
    """Write a `generation_config.json`: special tokens, no sampling settings."""
    return {
        "bos_token_id": cfg.bos_id,
        "eos_token_id": _one_or_list(cfg.eos_ids),
        "pad_token_id": cfg.pad_id,
    }


def _family(config: Mapping[str, Any]) -> model_config.Family:
    architectures = config.get("architectures")
    model_type = config.get("model_type")
    if not architectures and model_type in ARCHITECTURES.values():
        return model_type
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(
            f"architectures={json_file.show(architectures)} with model_type="
            f"{json_file.show(model_type)} names no architecture; supported: "
            f"{', '.join(ARCHITECTURES)}."
        )
    if architectures[0] not in tuple(ARCHITECTURES):
        raise ValueError(
            f"architectures={json_file.show(architectures[0])} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}."
        )
    family = ARCHITECTURES[architectures[0]]
    if model_type not in (None, family):
        raise ValueError(
            f"architectures={architectures[0]!r} contradicts model_type="
            f"{json_file.show(model_type)}: repair config.json."
        )
    return family


def _refuse_unknown(config: Mapping[str, Any], family: model_config.Family) -> None:
    for key, value in config.items():
        if key in _READ or key in _READ_BY_FAMILY[family] or key in _METADATA:
            continue
        if key in _ONLY:
            accepted, reason = _ONLY[key]
            if value not in accepted:
                raise ValueError(
                    f"config.json has {key}={json_file.show(value)}; accepted: "
                    f"{' or '.join(repr(a) for a in accepted)} ({reason})."
                )
        elif value is not None:
            raise ValueError(
                f"config.json has {json_file.word(key)}="
                f"{json_file.show(value)}, which is not supported for {family} "
                "models: if it does not change what the model computes, remove it from "
                "config.json."
            )


def _windows(
    config: Mapping[str, Any], family: model_config.Family, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    if family not in _WINDOWED:
        return None, ()
    width = None
    if hf_settings.boolean(config, "use_sliding_window"):
        if family in model_config.MIXTURES:
            raise ValueError(
                f"config.json has use_sliding_window=true, which is not computed for "
                f"{family} models: their windows are not chosen layer by layer."
            )
        if config.get("sliding_window") is not None:
            width = hf_settings.integer(config, "sliding_window")
        elif "sliding_window" not in config:
            width = 4096  # the families' default
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = hf_settings.integer(config, "max_window_layers", 28, at_least=0)
        windowed = tuple(width is not None and i >= first for i in range(num_layers))
    else:
        kinds = ("full_attention", "sliding_attention")
        is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
        if not is_list or any(kind not in kinds for kind in layer_types):
            raise ValueError(
                f"layer_types={json_file.show(layer_types)}; accepted: {num_layers} "
                "entries (num_hidden_layers), full_attention or sliding_attention."
            )
        windowed = tuple(kind == "sliding_attention" for kind in layer_types)
        if any(windowed) and width is None:
            raise ValueError(
                "layer_types has sliding_attention but use_sliding_window="
                f"{json_file.show(config.get('use_sliding_window'))} and "
                f"sliding_window={json_file.show(config.get('sliding_window'))} give "
                "no width: set both."
            )
    return (width, windowed) if any(windowed) else (None, ())


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Only those that are set; a negative id, as old files have, counts as unset."""
    ids = {}
    for field, key in (("bos_id", "bos_token_id"), ("pad_id", "pad_token_id")):
        if config.get(key) is not None:
            token_id = hf_settings.integer(config, key, at_least=-1)
            if token_id >= 0:
                ids[field] = token_id
    eos = config.get("eos_token_id")
    if eos is not None:
        given = eos if isinstance(eos, list) else [eos]
        ids["eos_ids"] = tuple(
            hf_settings.integer({"eos_token_id": one}, "eos_token_id", at_least=0)
            for one in given[:_MOST_EOS]
        )
        if len(given) > _MOST_EOS:
            raise ValueError(
                f"eos_token_id has {len(given)} entries; accepted: {_MOST_EOS}."
            )
    return ids


def _check_exportable(cfg: model_config.ModelConfig) -> None:
    is_llama, is_qwen2 = cfg.family == "llama", cfg.family == "qwen2"
    biases = f"qkv_bias={cfg.qkv_bias}", f"out_bias={cfg.out_bias}"
    refused = {
        f"qk_norm={cfg.qk_norm}": cfg.qk_norm != (cfg.family in _NORMED),
        f"qk_norm_joint={cfg.qk_norm_joint}": (
            cfg.qk_norm_joint != (cfg.family == "olmoe")
        ),
        "biases or shares that are not normalised": cfg.family == "mixtral"
        and (cfg.qkv_bias or cfg.experts is not None and not cfg.experts.normalised),
        f"windowed_layers in a {cfg.family}": (
            cfg.family in model_config.MIXTURES and any(cfg.windowed_layers)
        ),
        f"experts={cfg.experts}": (
            (cfg.experts is None) == (cfg.family in model_config.MIXTURES)
        ),
        ", ".join(biases): is_qwen2 and (cfg.out_bias or not cfg.qkv_bias),
        " apart from ".join(biases): not is_qwen2 and cfg.qkv_bias != cfg.out_bias,
        "mlp_bias=True": not is_llama and cfg.mlp_bias,
        "windowed_layers": is_llama and any(cfg.windowed_layers),
        f"d_model={cfg.d_model} over num_heads={cfg.num_heads}": (
            is_llama and cfg.d_model % cfg.num_heads > 0
        ),
        f"head_dim={cfg.head_dim} with d_model={cfg.d_model}": (
            cfg.family == "olmoe" and cfg.head_dim * cfg.num_heads != cfg.d_model
        ),
    }
    problems = [problem for problem, is_there in refused.items() if is_there]
    if problems:
        raise ValueError(
            f"no Hugging Face {cfg.family} model has {'; '.join(problems)}: change the "
            "family or the setting."
        )


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if len(ids) > 1:
        return list(ids)
    return ids[0] if ids else None
