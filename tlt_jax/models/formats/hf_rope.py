"""Translation between `RopeScaling` and the rotary settings of a `config.json`.

They stand there in one of two forms, or both: nested `rope_parameters` (transformers 5)
and `rope_theta` with `rope_scaling` (transformers 4).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from tlt_jax.models import config as model_config
from tlt_jax.models.formats import hf_settings, json_file

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(
        "factor original_max_position_embeddings low_freq_factor "
        "high_freq_factor".split()
    ),
    "yarn": tuple(
        "factor original_max_position_embeddings beta_fast beta_slow truncate "
        "attention_factor mscale mscale_all_dim".split()
    ),
}


def from_hf(
    config: Mapping[str, Any], max_positions: int
) -> tuple[float, model_config.RopeScaling | None]:
    """Read theta and scaling from either form; both may stand side by side.

    Args:
      config: the parsed `config.json`.
      max_positions: longest context of the model, from which some defaults follow.

    Returns:
      The base of the rotary frequencies, and how they are stretched, if they are.

    Raises:
      ValueError: naming a kind, key or value that is not computed here, or the key in
        which the two forms differ.
    """
    scaling = config.get("rope_scaling") or {}
    nested = config.get("rope_parameters") or {}
    for name, value in (("rope_scaling", scaling), ("rope_parameters", nested)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={json_file.show(value)} is not a JSON object.")
        if any(isinstance(entry, Mapping) for entry in value.values()):
            raise ValueError(
                f"{name} has an entry per kind of layer "
                f"({json_file.show(list(value))}): all "
                "layers must share one rotary embedding."
            )
    merged = dict(nested)
    for source in (scaling, {"rope_theta": config.get("rope_theta")}):
        for key, value in source.items():
            if value is None:
                continue
            if merged.get(key) not in (None, value):
                raise ValueError(
                    f"{json_file.word(key)}={json_file.show(value)} "
                    f"contradicts rope_parameters' {json_file.word(key)}="
                    f"{json_file.show(merged[key])}: repair config.json."
                )
            merged[key] = value
    theta = hf_settings.positive(merged, "rope_theta", 10_000.0)
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if merged.get("type") not in (None, kind):
        raise ValueError(
            f"rope type={json_file.show(merged['type'])} contradicts rope_type="
            f"{json_file.show(kind)}: repair config.json."
        )
    if kind not in tuple(_ROPE_KEYS):
        raise ValueError(
            f"rope_type={json_file.show(kind)} is not supported; supported: "
            f"{', '.join(_ROPE_KEYS)}."
        )
    partial = merged.pop("partial_rotary_factor", None)
    if partial not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor={json_file.show(partial)}; accepted: 1 (every "
            "dimension of a head is rotated)."
        )
    named = ("rope_type", "type", "rope_theta", *_ROPE_KEYS[kind])
    unknown = [k for k, v in merged.items() if v is not None and k not in named]
    if unknown:
        raise ValueError(
            f"rotary settings of rope_type={kind!r} have unsupported keys: "
            f"{json_file.word(', '.join(map(str, unknown)))}."
        )
    return theta, _rope_scaling(kind, merged, max_positions)


def to_hf(scaling: model_config.RopeScaling | None) -> dict[str, Any]:
    """Write the entries of `rope_scaling`, which are also those of `rope_parameters`.

    These are `rope_type` and the settings of that kind, without theta.
    """
    if scaling is None:
        return {"rope_type": "default"}
    fields = dataclasses.asdict(scaling)
    fields["original_max_position_embeddings"] = scaling.original_max_positions
    settings = {key: fields.get(key) for key in _ROPE_KEYS[scaling.kind]}
    given = {key: value for key, value in settings.items() if value is not None}
    return {"rope_type": scaling.kind, **given}


def _rope_scaling(
    kind: str, settings: Mapping[str, Any], max_positions: int
) -> model_config.RopeScaling | None:
    if kind == "default":
        return None
    positive = functools.partial(hf_settings.positive, settings)
    if kind == "linear":
        return model_config.RopeScaling("linear", positive("factor"))
    original = hf_settings.integer(
        settings, "original_max_position_embeddings", max_positions
    )
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        given = {name: positive(name) for name in names}
        return model_config.RopeScaling(
            "llama3", original_max_positions=original, **given
        )
    factor = positive("factor", max_positions / original)
    return model_config.RopeScaling(
        "yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=positive("beta_fast", 32.0),
        beta_slow=positive("beta_slow", 1.0),
        truncate=hf_settings.boolean(settings, "truncate", True),
        attention_factor=_yarn_attention_factor(settings, factor),
    )


def _yarn_attention_factor(settings: Mapping[str, Any], factor: float) -> float | None:
    if settings.get("attention_factor") is not None:
        return hf_settings.positive(settings, "attention_factor")
    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if not mscale and not all_dim:
        return None
    if not mscale or not all_dim:
        raise ValueError(
            f"yarn has mscale={json_file.show(mscale)} and mscale_all_dim="
            f"{json_file.show(all_dim)}: give both, or attention_factor instead."
        )
    mscale = hf_settings.positive(settings, "mscale")
    all_dim = hf_settings.positive(settings, "mscale_all_dim")
    if factor <= 1:
        return 1.0
    log = 0.1 * math.log(factor)
    return (mscale * log + 1) / (all_dim * log + 1)
