"""Tiny random models of `transformers`, the outside reference of these tests."""

import torch
import transformers

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
}

BASE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

ORIGINAL = 16  # context before stretching: the tests run beyond it
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)

EXPERTS = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True
)

# Together: every family; tied and untied heads; each bias; one and several query heads
# per kv head; a head dimension apart from D / N; each rotary scaling; windows.
CASES = {
    "llama-plain": ("llama", {}),
    "llama-tied-llama3": (
        "llama",
        dict(tie_word_embeddings=True, head_dim=6, rope_parameters=LLAMA3),
    ),
    "llama-biases-linear": (
        "llama",
        dict(
            attention_bias=True,
            mlp_bias=True,
            num_key_value_heads=4,
            rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0),
        ),
    ),
    "qwen2-yarn": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2-tied-windows": (
        "qwen2",
        dict(
            tie_word_embeddings=True,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    "qwen3-plain": ("qwen3", dict(rms_norm_eps=1e-2)),
    "qwen3-bias-windows-yarn": (
        "qwen3",
        dict(
            attention_bias=True,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=YARN | dict(attention_factor=1.3, truncate=False),
        ),
    ),
    "qwen3-moe-plain": ("qwen3_moe", EXPERTS),
    "qwen3-moe-tied-shares": (
        "qwen3_moe",
        EXPERTS | dict(norm_topk_prob=False, tie_word_embeddings=True),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    # Whose heads divide the width.
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=3, head_dim=6)),
    "olmoe-biases-shares": (
        "olmoe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=6,
            norm_topk_prob=True,
            attention_bias=True,
            num_key_value_heads=4,
        ),
    ),
}


def build(family: str, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """Make a model in fp32 whose norms and biases are random, too.

    Left at one and zero, as models are initialised, they would hide that one is
    dropped.
    """
    config_class, model_class = CLASSES[family]
    torch.manual_seed(seed)
    plain = dict(attn_implementation="eager", experts_implementation="eager")
    config = config_class(**(BASE | overrides), **plain)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def case(name: str) -> transformers.PreTrainedModel:
    """Make the model of an entry of `CASES`."""
    family, overrides = CASES[name]
    return build(family, **overrides)
