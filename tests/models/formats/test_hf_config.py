"""Configurations of Hugging Face models, both ways, and what is refused."""

import dataclasses
import json

import pytest
import transformers

from tests.models import tiny_hf
from tlt_jax.models import params as model_params
from tlt_jax.models.config import Experts, RopeScaling
from tlt_jax.models.formats import hf_config

QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=4,
    num_attention_heads=28,
    num_key_value_heads=4,
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_word_embeddings=False,
    bos_token_id=151643,
    eos_token_id=151645,
)
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN3 = QWEN2 | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3")


def test_a_released_qwen2_configuration_is_read():
    cfg = hf_config.from_hf(
        QWEN2
        | dict(
            attention_dropout=0.0,
            initializer_range=0.02,
            max_window_layers=28,
            sliding_window=131072,
            use_sliding_window=False,
            use_mrope=False,
            use_cache=True,
            torch_dtype="bfloat16",
            transformers_version="4.43.1",
        ),
        dict(eos_token_id=[151645, 151643], pad_token_id=151643, temperature=0.7),
    )
    assert (cfg.family, cfg.d_model, cfg.d_ff, cfg.num_layers) == (
        "qwen2",
        3584,
        18944,
        4,
    )
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (28, 4, 128)
    assert (cfg.qkv_bias, cfg.out_bias, cfg.mlp_bias) == (True, False, False)
    assert not cfg.qk_norm and not cfg.tie_embeddings
    assert cfg.rope_theta == 1e6 and cfg.rope_scaling is None
    assert cfg.sliding_window is None and cfg.windowed_layers == ()
    assert cfg.eos_ids == (151645, 151643)
    assert (cfg.bos_id, cfg.pad_id) == (151643, 151643)


def test_a_released_llama_configuration_is_read():
    scaling = dict(
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    )
    cfg = hf_config.from_hf(
        LLAMA
        | dict(
            attention_bias=False,
            mlp_bias=False,
            pretraining_tp=1,
            rope_interleaved=False,
            rope_theta=500000.0,
            rope_scaling=scaling,
            tie_word_embeddings=True,
            eos_token_id=[128001, 128008, 128009],
            max_position_embeddings=131072,
            pad_token_id=-1,
        )
    )
    assert cfg.head_dim == 64 and cfg.tie_embeddings
    assert cfg.rope_scaling == RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    assert cfg.eos_ids == (128001, 128008, 128009) and cfg.pad_id is None
    assert cfg.rms_norm_eps == 1e-6


def test_head_dimension_defaults_are_those_of_the_families():
    assert hf_config.from_hf(LLAMA).head_dim == 64
    assert hf_config.from_hf(LLAMA | dict(head_dim=96)).head_dim == 96
    assert hf_config.from_hf(QWEN3 | dict(hidden_size=1024)).head_dim == 128
    without = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert hf_config.from_hf(without).num_kv_heads == 32


@pytest.mark.parametrize(
    "architecture,attention_bias,expected",
    [
        (LLAMA, True, (True, True)),
        (LLAMA, False, (False, False)),
        (QWEN2, None, (True, False)),
        (QWEN3, True, (True, True)),
        (QWEN3, False, (False, False)),
    ],
)
def test_attention_bias_means_what_it_means_in_each_family(
    architecture, attention_bias, expected
):
    cfg = hf_config.from_hf(architecture | dict(attention_bias=attention_bias))
    assert (cfg.qkv_bias, cfg.out_bias) == expected


@pytest.mark.parametrize(
    "scaling,expected",
    [
        (dict(type="linear", factor=2), RopeScaling("linear", 2.0)),
        (dict(rope_type="default"), None),
        (
            dict(type="yarn", factor=4.0, original_max_position_embeddings=8192),
            RopeScaling("yarn", 4.0, 8192),
        ),
        (dict(rope_type="yarn", factor=2.0), RopeScaling("yarn", 2.0, 32768)),
        (
            dict(rope_type="yarn", original_max_position_embeddings=4096),
            RopeScaling("yarn", 8.0, 4096),
        ),
        (
            dict(rope_type="yarn", factor=2.0, mscale=0.5, mscale_all_dim=0.5),
            RopeScaling("yarn", 2.0, 32768, attention_factor=1.0),
        ),
    ],
)
def test_both_forms_of_rotary_settings_mean_the_same(scaling, expected):
    old = hf_config.from_hf(QWEN2 | dict(rope_scaling=scaling))
    nested = {k: v for k, v in QWEN2.items() if k != "rope_theta"}
    nested["rope_parameters"] = scaling | dict(rope_theta=1000000.0)
    assert old == hf_config.from_hf(nested)
    assert old.rope_scaling == expected
    assert old.rope_theta == 1e6


@pytest.mark.parametrize(
    "keys,expected",
    [
        (dict(use_sliding_window=False, sliding_window=64), (None, ())),
        (dict(use_sliding_window=True, sliding_window=None), (None, ())),
        (
            dict(use_sliding_window=True, sliding_window=64, max_window_layers=3),
            (64, (False, False, False, True)),
        ),
        (dict(use_sliding_window=True, sliding_window=64), (None, ())),
        (
            dict(
                use_sliding_window=True,
                sliding_window=64,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            (64, (True, False, True, False)),
        ),
    ],
)
def test_windows(keys, expected):
    cfg = hf_config.from_hf(QWEN2 | keys)
    assert (cfg.sliding_window, cfg.windowed_layers) == expected


REFUSED = [
    (dict(architectures=["PhimoeForCausalLM"]), "PhimoeForCausalLM.*LlamaForCausal"),
    (dict(architectures=["Qwen2Model"]), "Qwen2Model"),
    (dict(architectures=None, model_type="gemma2"), "gemma2"),
    (dict(model_type="llama"), "contradicts model_type='llama'"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(attention_dropout=0.1), "attention_dropout=0.1.*0.0"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (dict(pretraining_tp=2), "pretraining_tp=2"),
    (dict(attention_bias=False), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(num_experts=8), "num_experts=8"),
    (dict(some_new_key="x"), "some_new_key='x'"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    (dict(hidden_size="3584"), "hidden_size='3584'"),
    (dict(hidden_size=None), "hidden_size=None"),
    (dict(num_attention_heads=27), "hidden_size=3584.*27"),
    (dict(num_key_value_heads=3), "num_kv_heads=3"),
    (dict(vocab_size=0), "vocab_size=0"),
    (dict(rms_norm_eps=0.0), "rms_norm_eps=0.0"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
    (dict(eos_token_id=152064), "152064"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    (dict(rope_scaling=dict(type="linear")), "factor=None"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, mscale=1.0)), "mscale_all_dim"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, long=1)), "keys: long"),
    (dict(rope_scaling=dict(rope_type="yarn", type="linear")), "contradicts"),
    (dict(rope_parameters=dict(rope_theta=5.0)), "rope_theta=1000000.0 contradicts"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary"),
    (dict(rope_parameters=dict(full_attention=dict(rope_theta=5.0))), "full_attention"),
    (dict(layer_types=["full_attention"] * 3), "layer_types"),
    (dict(layer_types=["linear_attention"] * 4), "linear_attention"),
    (dict(layer_types=["sliding_attention"] * 4), "use_sliding_window=None"),
]


@pytest.mark.parametrize("change,message", REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(QWEN2 | change)


def moe(**changes):
    sizes = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    family = dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe")
    return QWEN2 | family | sizes | dict(norm_topk_prob=True) | changes


def test_a_released_mixture_is_read():
    """As Qwen/Qwen3-30B-A3B has it, and with the other name of one entry."""
    released = dict(
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=48,
    )
    config = moe(**released)
    cfg = hf_config.from_hf(config)
    assert cfg.experts == Experts(128, 8, 768, normalised=True) and cfg.qk_norm
    other = config | dict(num_local_experts=128)
    del other["num_experts"]
    assert hf_config.from_hf(other) == cfg
    assert not hf_config.from_hf(moe(norm_topk_prob=False)).experts.normalised
    assert cfg.dense().family == "qwen3" and cfg.dense().experts is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(decoder_sparse_step=2),
            "decoder_sparse_step=2.*every layer is a mixture",
        ),
        (dict(mlp_only_layers=[0]), r"mlp_only_layers=\[0\].*every layer is a mixture"),
        (dict(shared_expert_intermediate_size=64), "shared_expert_inter.*not computed"),
        (dict(n_shared_experts=1), "n_shared_experts=1.*not computed"),
        (dict(scoring_func="sigmoid"), "scoring_func='sigmoid'.*softmax"),
        (dict(topk_method="noaux_tc"), "topk_method='noaux_tc'.*softmax"),
        (dict(use_sliding_window=True), "use_sliding_window=true.*qwen3_moe"),
        (
            dict(num_local_experts=64),
            "num_experts=128 contradicts num_local_experts=64",
        ),
        (dict(num_experts_per_tok=129), "per_token=129; accepted.*128 experts"),
        (dict(norm_topk_prob=1), "norm_topk_prob=1; accepted: true or false"),
        (dict(architectures=["Qwen2MoeForCausalLM"]), "Qwen2MoeForCausalLM.*supported"),
    ],
)
def test_mixtures_that_are_not_computed_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as error:
        hf_config.from_hf(moe(**change))
    assert "\n" not in str(error.value)


def olmoe(**changes):
    """As allenai/OLMoE-1B-7B-0924 has it."""
    released = dict(
        architectures=["OlmoeForCausalLM"],
        model_type="olmoe",
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        clip_qkv=None,
        attention_bias=False,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=4096,
        hidden_act="silu",
        pad_token_id=1,
        eos_token_id=50279,
        tie_word_embeddings=False,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
    )
    return released | changes


def test_olmoe_is_read():
    cfg = hf_config.from_hf(olmoe())
    assert cfg.experts == Experts(64, 8, 1024, normalised=False)
    assert cfg.qk_norm and cfg.qk_norm_joint and cfg.head_dim == 128
    # 6.9 billion weights, as its card says.
    assert model_params.count(cfg) == 6_919_161_856
    drafter = cfg.dense()
    assert drafter.family == "llama" and not drafter.qk_norm
    hf_config.to_hf(drafter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(clip_qkv=8.0), "clip_qkv=8.0; accepted: None .*not clipped"),
        (dict(head_dim=64), "head_dim=64 with hidden_size=2048.*remove head_dim"),
        (dict(sliding_window=4096), "sliding_window=4096.*olmoe"),
        (dict(moe_intermediate_size=64), "moe_intermediate_size=64.*olmoe"),
        (dict(architectures=["FlexOlmoForCausalLM"]), "FlexOlmoForCausalLM.*supported"),
    ],
)
def test_an_olmoe_that_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as error:
        hf_config.from_hf(olmoe(**change))
    assert "\n" not in str(error.value)


def test_a_window_of_llama_is_refused():
    with pytest.raises(ValueError, match="sliding_window=4096"):
        hf_config.from_hf(LLAMA | dict(sliding_window=4096))


@pytest.mark.parametrize("name", tiny_hf.CASES)
def test_what_is_written_reads_the_same_here_and_in_transformers(name, tmp_path):
    family, overrides = tiny_hf.CASES[name]
    config_class, _ = tiny_hf.CLASSES[family]
    theirs = config_class(**(tiny_hf.BASE | overrides))
    theirs.architectures = [tiny_hf.CLASSES[family][1].__name__]
    cfg = hf_config.from_hf(theirs.to_dict())
    written = hf_config.to_hf(cfg, "bfloat16")
    assert hf_config.from_hf(written) == cfg

    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert loaded["dtype"] == "bfloat16"
    expected = theirs.to_dict()
    expected["rope_parameters"].setdefault("beta_fast", 32.0)
    expected["rope_parameters"].setdefault("beta_slow", 1.0)
    expected["rope_parameters"].setdefault("truncate", True)
    irrelevant = {"dtype", "max_window_layers", "transformers_version"}
    irrelevant.add("_name_or_path")
    for key, value in expected.items():
        if key == "rope_parameters":
            assert loaded[key].items() <= value.items()
        elif key not in irrelevant:
            assert loaded[key] == value, key


def test_the_form_of_transformers_4_stands_beside_that_of_5():
    cfg = hf_config.from_hf(QWEN2 | dict(rope_scaling=dict(type="linear", factor=2.0)))
    written = hf_config.to_hf(cfg)
    assert written["rope_theta"] == 1e6 and written["torch_dtype"] == "float32"
    assert written["rope_scaling"] == dict(rope_type="linear", factor=2.0)
    assert written["rope_parameters"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "base,change,message",
    [
        (LLAMA, dict(qkv_bias=True), "qkv_bias=True apart from out_bias=False"),
        (LLAMA, dict(qk_norm=True), "qk_norm=True"),
        (LLAMA, dict(d_model=2040, num_heads=16), "d_model=2040"),
        (QWEN2, dict(qkv_bias=False), "qkv_bias=False"),
        (QWEN2, dict(mlp_bias=True), "mlp_bias"),
        (QWEN3, dict(qk_norm=False), "qk_norm=False"),
        (QWEN3, dict(qk_norm_joint=True), "qk_norm_joint=True"),
    ],
)
def test_what_transformers_has_no_class_for_is_not_written(base, change, message):
    cfg = dataclasses.replace(hf_config.from_hf(base), **change)
    with pytest.raises(ValueError, match=message):
        hf_config.to_hf(cfg)


def test_directories_without_a_readable_configuration(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert hf_config.read(tmp_path).eos_ids == (7,)
