"""Models in GGUF files: configuration, weights and tokenizer."""

import functools
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tlt_jax.models import config as model_config
from tlt_jax.models import layers
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import hf_settings, json_file
from tlt_jax.models.formats import layout as model_layout
from tlt_jax.models.formats import tokenizer as model_tokenizer

# Suffixes of `<architecture>.` that are read; any other is refused by name.
_READ = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size "
    "attention.head_count attention.head_count_kv attention.key_length "
    "attention.value_length attention.layer_norm_rms_epsilon rope.freq_base "
    "rope.dimension_count rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.attn_factor "
    "rope.scaling.finetuned rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow".split()
)
_READ_OF_MIXTURES = frozenset(
    "expert_count expert_used_count expert_feed_forward_length".split()
)
# What files call the families.
_ARCHITECTURES: Mapping[str, model_config.Family] = {
    **{name: name for name in ("llama", "qwen2", "qwen3")},
    "qwen3moe": "qwen3_moe",
}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class GGUFFile:
    """A model in the file at `path`."""

    def __init__(self, path: str | os.PathLike):
        """Open a file and read its metadata; weights stay on disk.

        Raises:
          ValueError: if it is missing, truncated, or no GGUF file, or the package
            that reads such files is not installed.
        """
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise ValueError(f"{self.path} does not exist or is not a file.")
        gguf = _package(self.path)
        # It needs the package, too.
        header = importlib.import_module("tlt_jax.models.formats.gguf_header")
        try:
            header.check(self.path)
            self._reader = gguf.GGUFReader(self.path)
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be read ({error.strerror}): give permission to "
                "read it, or fetch it again."
            ) from error
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            # What the reader meets first in a file that is cut or of another kind.
            raise ValueError(
                f"{self.path} is truncated or not a GGUF file ({error}): fetch it "
                "again."
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @functools.cached_property
    def config(self) -> model_config.ModelConfig:
        """The model that the metadata describes.

        Raises:
          ValueError: naming an architecture or key that is not computed here.
        """
        family = self._family()
        parts = self._meta("split.count")
        if parts not in (None, 0, 1):
            raise ValueError(
                f"{self.path} is one of {json_file.show(parts)} parts of a model "
                "(split.count): merge them with `llama-gguf-split --merge`, or take "
                "the model as one file."
            )
        d_model = self._integer("embedding_length")
        num_heads = self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", d_model // num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._get(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.path}: {family}.{key}={self._get(key)} differs from the "
                    f"head dimension {head_dim}, which is not supported."
                )
        eos = [self._token_id(name) for name in ("eos", "eot")]
        return model_config.ModelConfig(
            family=family,
            vocab_size=self._shape(model_layout.GGUF_NAMES["embed"])[0],
            num_layers=self._integer("block_count"),
            d_model=d_model,
            d_ff=self._integer("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=self._integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            tie_embeddings=model_layout.GGUF_NAMES["lm_head"] not in self._tensors,
            qkv_bias=self._has("q_bias"),
            out_bias=self._has("out_bias"),
            mlp_bias=self._has("gate_bias"),
            qk_norm=self._has("q_norm"),
            rms_norm_eps=self._positive("attention.layer_norm_rms_epsilon"),
            rope_theta=self._positive("rope.freq_base", 10_000.0),
            rope_scaling=self._rope_scaling(head_dim),
            max_positions=self._integer("context_length"),
            bos_id=self._token_id("bos"),
            eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
            pad_id=self._token_id("padding"),
            experts=self._experts() if family in model_config.MIXTURES else None,
        )

    def load(
        self, dtype=jnp.float32, shardings: model_params.Params | None = None
    ) -> model_params.Params:
        """Load the weights, dequantised.

        Args:
          dtype: of the result.
          shardings: a sharding per leaf, or None for the default device.

        Raises:
          ValueError: naming tensors that are missing, surplus, misshapen or of a type
            that cannot be dequantised.
        """
        leaves = model_layout.layout(self.config, model_layout.GGUF_NAMES)
        return model_layout.assemble(leaves, self, dtype, shardings)

    def tokenizer(self) -> model_tokenizer.Tokenizer:
        """Build the tokenizer from the metadata.

        Raises:
          ValueError: naming a kind of tokenizer that is not read.
        """
        kind = self._meta("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ValueError(
                f"{self.path}: tokenizer.ggml.model={json_file.show(kind)}; "
                "accepted: gpt2 "
                "(byte-level BPE). Take the tokenizer from the model's Hugging Face "
                "directory."
            )
        tokens, merges = self._texts("tokens"), self._texts("merges")
        if not tokens or len(set(tokens)) < len(tokens):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.tokens has {len(tokens)} tokens, "
                f"{len(set(tokens))} of them distinct: fetch it again."
            )
        backend = _byte_level_bpe(self._meta("tokenizer.ggml.pre"), tokens, merges)
        types = self._meta("tokenizer.ggml.token_type") or [1] * len(tokens)
        if not isinstance(types, list) or len(types) != len(tokens):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.token_type={json_file.show(types)} is "
                f"not a type for each of the {len(tokens)} tokens: fetch it again."
            )

        def added(*wanted):
            return [
                tokenizers.AddedToken(token, normalized=False)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ in wanted
            ]

        kinds = _package(self.path).TokenType
        backend.add_special_tokens(added(kinds.UNKNOWN, kinds.CONTROL))
        backend.add_tokens(added(kinds.USER_DEFINED))
        config = {"clean_up_tokenization_spaces": False}
        roles = dict(bos="bos", eos="eos", pad="padding", unk="unknown")
        for role, key in roles.items():
            token_id = self._token_id(key)
            if token_id is None:
                continue
            if token_id >= len(tokens):
                raise ValueError(
                    f"{self.path}: tokenizer.ggml.{key}_token_id={token_id} is none of "
                    f"the {len(tokens)} tokens: fetch it again."
                )
            config[f"{role}_token"] = tokens[token_id]
        if self._meta("tokenizer.ggml.add_bos_token"):
            bos = config.get("bos_token")
            if bos is None:
                raise ValueError(
                    f"{self.path}: tokenizer.ggml.add_bos_token without a "
                    "bos_token_id: fetch it again."
                )
            first = processors.TemplateProcessing(
                single=f"{bos}:0 $A:0",
                pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
                special_tokens=[(bos, tokens.index(bos))],
            )
            backend.post_processor = processors.Sequence(
                [backend.post_processor, first]
            )
        template = self._meta("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise ValueError(
                f"{self.path}: tokenizer.chat_template is no text: fetch it again."
            )
        return model_tokenizer.Tokenizer(backend, config, template)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, rows first, without what `config` has taken in."""
        return {n: self._shape(n) for n in self._tensors if n != "rope_freqs.weight"}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantise a slice of a tensor into float32."""
        tensor, gguf = self._tensors[name], _package(self.path)
        try:
            # What is not finite in a file is told to the user where it is seen.
            with np.errstate(all="ignore"):
                if not self._is_permuted(name):
                    rows = gguf.dequantize(tensor.data[index[0]], tensor.tensor_type)
                    return rows[(slice(None), *index[1:])]
                whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} is {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantise: take another quantisation, such as Q8_0."
            ) from None
        pairs = whole.reshape(-1, self.config.head_dim // 2, 2, *whole.shape[1:])
        return pairs.swapaxes(1, 2).reshape(whole.shape)[index]

    def _is_permuted(self, name: str) -> bool:
        """Whether rows are stored so that the two of a rotated pair are neighbours."""
        projections = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
        return self.config.family == "llama" and name.endswith(projections)

    def _family(self) -> model_config.Family:
        architecture = self._meta("general.architecture")
        if architecture not in tuple(_ARCHITECTURES):
            raise ValueError(
                f"{self.path}: general.architecture={json_file.show(architecture)} "
                f"is not supported; supported: {', '.join(_ARCHITECTURES)}."
            )
        family = _ARCHITECTURES[architecture]
        read = _READ | _READ_OF_MIXTURES if family in model_config.MIXTURES else _READ
        for key, field in self._reader.fields.items():
            prefix, _, suffix = key.partition(".")
            if prefix != architecture or suffix in read:
                continue
            raise ValueError(
                f"{self.path}: {json_file.word(key)}="
                f"{json_file.show(field.contents())} is not supported for "
                f"{architecture} models."
            )
        return family

    def _experts(self) -> model_config.Experts:
        return model_config.Experts(
            num=self._integer("expert_count"),
            per_token=self._integer("expert_used_count"),
            d_ff=self._integer("expert_feed_forward_length"),
        )

    def _rope_scaling(self, head_dim: int) -> model_config.RopeScaling | None:
        kind = self._get("rope.scaling.type", "none")
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling(head_dim)
        if kind == "none":
            return None
        factor = self._positive("rope.scaling.factor")
        if kind == "linear":
            return model_config.RopeScaling("linear", factor)
        if kind != "yarn":
            raise ValueError(
                f"{self.path}: rope.scaling.type={json_file.show(kind)}; accepted: "
                "none, linear, yarn."
            )
        original = self._integer("rope.scaling.original_context_length")
        attention = self._positive("rope.scaling.attn_factor", 1.0)
        return model_config.RopeScaling(
            "yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=self._positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self._positive("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=(
                None if attention == 1 else attention * (0.1 * np.log(factor) + 1)
            ),
        )

    def _llama3_scaling(self, head_dim: int) -> model_config.RopeScaling:
        """Recover the scaling from the table of divisors that it is stored as.

        The table is compared with what the released Llama 3 models give for its largest
        divisor; another one is refused, not approximated.
        """
        divisors = np.asarray(self._tensors["rope_freqs.weight"].data, np.float64)
        scaling = model_config.RopeScaling(
            "llama3",
            factor=float(divisors.max()),
            original_max_positions=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
        theta = self._positive("rope.freq_base", 10_000.0)
        freqs = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        expected = freqs / layers.llama3_frequencies(freqs, scaling)
        if divisors.shape != expected.shape or not np.allclose(
            divisors, expected, rtol=1e-3
        ):
            raise ValueError(
                f"{self.path}: rope_freqs.weight is not the table of a Llama 3 model: "
                "take the model's Hugging Face directory."
            )
        return scaling

    def _has(self, role: str) -> bool:
        return model_layout.GGUF_NAMES[role].format(0) in self._tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name}.")
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def _get(self, suffix: str, default: Any = None) -> Any:
        value = self._meta(f"{self._meta('general.architecture')}.{suffix}")
        if isinstance(value, list):
            raise ValueError(
                f"{self.path}: {suffix} differs between layers, which is not supported."
            )
        return default if value is None else value

    def _integer(self, suffix: str, default: int | None = None) -> int:
        return hf_settings.integer(*self._required(suffix, default))

    def _positive(self, suffix: str, default: float | None = None) -> float:
        return hf_settings.positive(*self._required(suffix, default))

    def _required(self, suffix: str, default: Any) -> tuple[dict[str, Any], str]:
        """Return an entry under the name that an error shall give it."""
        value = self._get(suffix, default)
        if value is None:
            raise ValueError(f"{self.path} has no metadata {suffix}.")
        name = f"{self.path}: {suffix}"
        return {name: value}, name

    def _token_id(self, role: str) -> int | None:
        key = f"tokenizer.ggml.{role}_token_id"
        value = self._meta(key)
        if value is None:
            return None
        return hf_settings.integer({key: value}, key, at_least=0)

    def _texts(self, key: str) -> list[str]:
        """Return a list of texts of the tokenizer, empty where there is none."""
        value = self._meta(f"tokenizer.ggml.{key}")
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{key}={json_file.show(value)} is no "
                "list of texts: fetch it again."
            )
        return value

    def _meta(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        if field is None:
            return None
        value = field.contents()
        if field.types == [_package(self.path).GGUFValueType.FLOAT32]:
            # The decimal that was meant: 1e-5, not 9.99999974e-06.
            return float(str(np.float32(value)))
        return value


def _package(path: str) -> ModuleType:
    """Return the package that reads such files; nothing else needs it.

    Raises:
      ValueError: it is not installed; the message has the remedy.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(
            f"{path} is read by the package gguf, which is not installed here: "
            "pip install gguf, or take the model's Hugging Face directory."
        ) from error


def _byte_level_bpe(
    pre: str | None, tokens: list[str], merges: list[str]
) -> tokenizers.Tokenizer:
    """Build byte-level BPE whose texts are split as `pre` says before merging."""
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
    digits["deepseek-r1-qwen"] = digits["qwen2"]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        # Digits come first: whitespace before a digit is then a word of its own.
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain])
    elif pre == "gpt-2":
        pre_tokenizer = plain
    elif pre in tuple(digits):
        pattern = f"{_CONTRACTIONS}|{_WORDS}|{digits[pre]}|{_REST}"
        pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        raise ValueError(
            f"tokenizer.ggml.pre={json_file.show(pre)} is not supported; supported: "
            "gpt-2, smollm, "
            f"{', '.join(digits)}. Take the tokenizer from the model's Hugging Face "
            "directory."
        )
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error}): fetch "
            "the file again."
        ) from error
    backend = tokenizers.Tokenizer(model)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend
