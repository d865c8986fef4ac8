"""Published drafters in miniature: files as their authors write them, their meaning.

The names and the arithmetic are written down from EAGLE's, SGLang's and vLLM's own code
and not from ours; the forward is plain torch.
"""

import json

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch

from tlt_jax.models import config as model_config

# A target with enough layers for EAGLE-3's three, and sizes that are all different.
TARGET = model_config.ModelConfig(
    family="qwen3",
    vocab_size=24,
    num_layers=8,
    d_model=16,
    d_ff=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    tie_embeddings=True,
    qk_norm=True,
    max_positions=64,
    eos_ids=(3,),
)
DRAFT_IDS = np.array([0, 2, 3, 5, 8, 11, 13, 14, 17, 20, 22])

# The drafter has other sizes than its target wherever it may: F 28, N 2, K 1, H 10.
LAYER = {
    "self_attn.q_proj.weight": (20, None),
    "self_attn.k_proj.weight": (10, None),
    "self_attn.v_proj.weight": (10, None),
    "self_attn.o_proj.weight": (16, 20),
    "post_attention_layernorm.weight": (16,),
    "mlp.gate_proj.weight": (28, 16),
    "mlp.up_proj.weight": (28, 16),
    "mlp.down_proj.weight": (16, 28),
}


def _layer(prefix, read):
    return {
        f"{prefix}.{name}": tuple(read if n is None else n for n in shape)
        for name, shape in LAYER.items()
    }


def _eagle3(prefix):
    return {
        "d2t": (11,),
        "t2d": (24,),
        "fc.weight": (16, 48),
        "lm_head.weight": (11, 16),
        "norm.weight": (16,),
        f"{prefix}.hidden_norm.weight": (16,),
        f"{prefix}.input_layernorm.weight": (16,),
        **_layer(prefix, 32),
    }


SHAPES = {
    "eagle": {"fc.weight": (16, 32), "fc.bias": (16,), **_layer("layers.0", 16)},
    "eagle3": _eagle3("midlayer"),
    "speculators": _eagle3("layers.0"),
}
# As in yuhuili/EAGLE-llama2-chat-7B.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 28,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 24,
}
CONFIGS = {
    "eagle": LLAMA,
    # As in yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, with the class that SGLang asks for.
    "eagle3": LLAMA
    | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 11},
    # As in nm-testing/EAGLE3-LLaMA3.1-Instruct-8B-converted, with layers of its own.
    "speculators": {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": 11,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 7],
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {
                "architectures": ["LlamaForCausalLM"],
                "name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
            },
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.1.0.dev14",
        "target_hidden_size": None,
        "torch_dtype": "float32",
        "transformer_layer_config": {
            key: value
            for key, value in LLAMA.items()
            if key not in ("architectures", "torch_dtype", "transformers_version")
        },
    },
}


def tensors(layout, seed=0, dtype=np.float16):
    """Random tensors of a layout, as a file holds them."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in SHAPES[layout].items():
        noise = rng.normal(size=shape)
        scaled = 1 + 0.3 * noise if "norm" in name else noise * shape[-1] ** -0.5
        out[name] = scaled.astype(dtype)
    if layout != "eagle":
        out["d2t"] = (DRAFT_IDS - np.arange(11)).astype(np.int64)
        out["t2d"] = np.isin(np.arange(24), DRAFT_IDS)
    return out


def write(directory, layout, given=None, copies=True, **changes):
    """Write a directory; `copies`: with the target's embedding, as authors do."""
    directory.mkdir(parents=True, exist_ok=True)
    given = tensors(layout) if given is None else given
    if copies:
        given = given | {"embed_tokens.weight": np.zeros((24, 16), np.float16)}
    safetensors.numpy.save_file(given, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIGS[layout] | changes))
    return directory


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x, positions):
    """Rotate `[T, heads, H]`, halves against each other."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.cat([positions[:, None] * frequencies] * 2, -1)[:, None]
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


class Twin:
    """A published drafter over one text, drafting position by position."""

    def __init__(self, layout, weights, norm_before_residual=False):
        self.w = {
            name: torch.from_numpy(np.asarray(x, np.float32))
            for name, x in weights.items()
            if name not in ("d2t", "t2d")
        }
        self.layout, self.before = layout, norm_before_residual
        self.prefix = "midlayer." if layout == "eagle3" else "layers.0."
        self.keys, self.values = torch.zeros(0, 1, 10), torch.zeros(0, 1, 10)

    def fuse(self, features):
        """Make `[T, D]` of the target's `[T, n x D]`."""
        if self.layout == "eagle":
            return features
        return features @ self.w["fc.weight"].T

    def __call__(self, embedded, features, start):
        """Append positions from `start` on; features `[T, D]` and logits."""
        w, name = self.w, self.prefix
        both = torch.cat
        if self.layout == "eagle":
            x = both([embedded, features], -1) @ w["fc.weight"].T + w["fc.bias"]
            seen = x
        else:
            token = rms(embedded, w[name + "input_layernorm.weight"])
            normed = rms(features, w[name + "hidden_norm.weight"])
            seen = both([token, normed], -1)
            x = normed if self.before else features
        positions = torch.arange(start, start + len(x))
        q, k, v = (
            (seen @ w[f"{name}self_attn.{p}_proj.weight"].T).reshape(len(x), -1, 10)
            for p in "qkv"
        )
        q, k = rotate(q, positions), rotate(k, positions)
        self.keys = both([self.keys, k])
        self.values = both([self.values, v])
        scores = torch.einsum("tnh,skh->nts", q, self.keys) / 10**0.5
        hidden = torch.arange(len(self.keys))[None] > positions[:, None]
        law = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        heads = torch.einsum("nts,skh->tnh", law, self.values).reshape(len(x), -1)
        x = x + heads @ w[name + "self_attn.o_proj.weight"].T
        normed = rms(x, w[name + "post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(normed @ w[name + "mlp.gate_proj.weight"].T)
        up = normed @ w[name + "mlp.up_proj.weight"].T
        return x + (gate * up) @ w[name + "mlp.down_proj.weight"].T

    def logits(self, features, target_head):
        """Multiply by the head: EAGLE's is the target's."""
        if self.layout == "eagle":
            return features @ target_head.T
        return rms(features, self.w["norm.weight"]) @ self.w["lm_head.weight"].T


def columns(x):
    """Turn `[T, D]` of torch into our `[D, 1, T]`."""
    return jnp.asarray(x.numpy()).T[:, None]
