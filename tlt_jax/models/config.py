"""The decoder architectures this package computes, as one frozen description."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe"]
FAMILIES: tuple[Family, ...] = typing.get_args(Family)
# Families of mixtures, each with the one whose dense layers are alike otherwise, but
# for OLMoE's norms, which no dense family has.
MIXTURES: Mapping[str, Family] = {
    "qwen3_moe": "qwen3",
    "mixtral": "llama",
    "olmoe": "llama",
}

# Far beyond any model: what says more is damaged, and would ask for all memory.
MOST: Mapping[str, int] = {
    "vocab_size": 2**24,
    "num_layers": 2**10,
    "d_model": 2**18,
    "d_ff": 2**20,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "num_experts": 2**15,
    "max_positions": 2**31 - 1,
}
_SIZES = tuple(name for name in MOST if name != "num_experts")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training context.

    Attributes:
      kind: `linear` (all frequencies divided), `llama3` (low frequencies divided, high
        kept, smooth between), `yarn` (ramp between wavelength bounds, plus a factor on
        cos and sin).
      factor: the stretch.
      original_max_positions: context length before stretching (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3 bounds.
      beta_fast, beta_slow: yarn bounds, in rotations over the original context.
      truncate: yarn: round the ramp's bounds to whole dimensions.
      attention_factor: yarn's factor on cos and sin; None: 0.1 ln(factor) + 1.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"kind={self.kind!r}; accepted: linear, llama3, yarn.")
        names = ("factor", "low_freq_factor", "high_freq_factor")
        for name in (*names, "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if value is None and name == "attention_factor":
                continue
            _check_positive(f"rope_scaling.{name}", value)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Feed-forward blocks of which a router chooses a few for every token.

    The router's probabilities are a softmax over all experts; the largest are chosen.
    Where a model takes the softmax over the chosen ones alone, that is the same as
    `normalised`.

    Attributes:
      num: experts of a layer.
      per_token: experts that a token passes, at most `num`.
      d_ff: feed-forward dimension of one expert, the F of its weights.
      normalised: the chosen experts' probabilities are divided by their sum.
    """

    num: int
    per_token: int
    d_ff: int
    normalised: bool = True

    def __post_init__(self):
        for name, most in (("num", MOST["num_experts"]), ("d_ff", MOST["d_ff"])):
            size = getattr(self, name)
            if type(size) is not int or not 0 < size <= most:
                raise ValueError(
                    f"experts.{name}={str(size)[:40]}; accepted: an integer from 1 to "
                    f"{most}."
                )
        if type(self.per_token) is not int or not 0 < self.per_token <= self.num:
            raise ValueError(
                f"experts.per_token={str(self.per_token)[:40]}; accepted: an integer "
                f"from 1 to the {self.num} experts of a layer."
            )
        if not isinstance(self.normalised, bool):
            raise ValueError("experts.normalised is neither True nor False.")

    @property
    def route_dtype(self) -> str:
        """Of an expert's number where many are kept; `num` stands for none."""
        return "uint8" if self.num < 2**8 else "uint16"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: what is computed, not how or where.

    Attributes:
      family: decides the Hugging Face names on import and export.
      d_model, d_ff, num_layers, vocab_size: D, F, L, V.
      num_heads, num_kv_heads, head_dim: N, K, H; N is a multiple of K and N x H need
        not be D.
      tie_embeddings: the LM head is the embedding.
      qkv_bias, out_bias, mlp_bias: biases of the projections.
      qk_norm: RMS norm over H of every query and key head, before rotation.
      qk_norm_joint: of `qk_norm`: one over all query heads together, and one over all
        key heads.
      rms_norm_eps: added to the mean square.
      rope_theta, rope_scaling: rotary embedding.
      sliding_window: a windowed layer sees keys at distance < sliding_window.
      windowed_layers: length L; which layers are windowed. Empty: none.
      max_positions: longest context that the weights are said to support.
      bos_id, eos_ids, pad_id: special tokens; `eos_ids` ends a completion.
      experts: every layer's feed-forward block is a mixture of them, and `d_ff` that of
        a dense block beside it, which only a drafter has; None: dense blocks.
    """

    family: Family
    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    experts: Experts | None = None
    qk_norm_joint: bool = False

    def __post_init__(self):
        for name in _SIZES:
            size, most = getattr(self, name), MOST[name]
            if type(size) is not int or not 0 < size <= most:
                raise ValueError(
                    f"{name}={str(size)[:40]}; accepted: an integer from 1 to {most}."
                )
        if self.family not in FAMILIES:
            raise ValueError(
                f"family={str(self.family)[:40]!r}; accepted: {', '.join(FAMILIES)}."
            )
        _check_positive("rms_norm_eps", self.rms_norm_eps, most=1)
        _check_positive("rope_theta", self.rope_theta)
        flags = ("tie_embeddings", "qkv_bias", "out_bias", "mlp_bias", "qk_norm")
        for name in (*flags, "qk_norm_joint"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is neither True nor False.")
        if self.qk_norm_joint and not self.qk_norm:
            raise ValueError("qk_norm_joint=True says how qk_norm is done: set both.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}: every kv head serves the same number of query "
                "heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: rotary embedding turns pairs of "
                "dimensions."
            )
        if self.experts is not None and self.mlp_bias:
            raise ValueError("mlp_bias=True with experts: experts have no biases.")
        if self.windowed_layers and len(self.windowed_layers) != self.num_layers:
            raise ValueError(
                f"windowed_layers has {len(self.windowed_layers)} entries for "
                f"num_layers={self.num_layers}: give one per layer or none."
            )
        if any(self.windowed_layers) and self.sliding_window is None:
            raise ValueError(
                "windowed_layers is set but sliding_window is None: give the window's "
                "width in tokens."
            )
        width = self.sliding_window
        if width is not None and not 0 < width <= MOST["max_positions"]:
            raise ValueError(
                f"sliding_window={width}; accepted: 1 to {MOST['max_positions']}, or "
                "None."
            )
        for name in ("eos_ids", "bos_id", "pad_id"):
            given = getattr(self, name)
            ids = given if name == "eos_ids" else () if given is None else (given,)
            bad = [i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size]
            if bad:
                raise ValueError(
                    f"{name} contains {str(bad)[:80]}, outside the vocabulary of "
                    f"{self.vocab_size}."
                )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Rebuild a description from what JSON made of `dataclasses.asdict`."""
        given = dict(fields)
        if given["rope_scaling"] is not None:
            given["rope_scaling"] = RopeScaling(**given["rope_scaling"])
        # Written before there were experts it has no entry.
        if given.get("experts") is not None:
            given["experts"] = Experts(**given["experts"])
        for name in ("windowed_layers", "eos_ids"):
            given[name] = tuple(given[name])
        return cls(**given)

    @property
    def heads_per_kv(self) -> int:
        """G, query heads served by one key/value head."""
        return self.num_heads // self.num_kv_heads

    def dense(self) -> "ModelConfig":
        """Describe the same model with dense blocks in place of experts."""
        family = MIXTURES.get(self.family, self.family)
        norms = {"qk_norm": self.qk_norm and not self.qk_norm_joint}
        return dataclasses.replace(
            self, family=family, experts=None, **norms, qk_norm_joint=False
        )

    def window(self, layer: int) -> int | None:
        """Width in tokens of `layer`'s window, or None where it sees everything."""
        if self.windowed_layers and self.windowed_layers[layer]:
            return self.sliding_window
        return None


def _check_positive(name: str, value: float, most: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < most:
        bound = "" if most == math.inf else f" and below {most}"
        raise ValueError(f"{name}={str(value)[:40]}; accepted: above 0{bound}.")
