"""What a description refuses, what JSON keeps of it, and which layers have a window."""

import dataclasses
import json

import pytest

from tlt_jax.models import config

SIZES = dict(
    family="qwen2",
    vocab_size=11,
    num_layers=3,
    d_model=12,
    d_ff=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=False,
)


def test_sizes_that_do_not_fit_are_named():
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            config.ModelConfig(**SIZES | changes)

    refused("num_heads=6 is not a multiple of num_kv_heads=4", num_kv_heads=4)
    refused("head_dim=5 is odd", head_dim=5)
    refused("windowed_layers has 2 entries for num_layers=3", windowed_layers=(0, 0))
    refused("sliding_window is None", windowed_layers=(False, True, False))
    refused(r"eos_ids contains \[11, -1\], outside .* 11", eos_ids=(11, 10, -1))
    # Windows that no layer has need no width.
    cfg = config.ModelConfig(**SIZES, windowed_layers=(False,) * 3, eos_ids=(0, 10))
    assert cfg.heads_per_kv == 3


def test_json_keeps_all_of_a_description():
    scaling = config.RopeScaling("yarn", 4.0, 16, truncate=False, attention_factor=1.5)
    cfg = config.ModelConfig(
        **SIZES,
        rope_scaling=scaling,
        sliding_window=7,
        windowed_layers=(True, False, True),
        eos_ids=(3, 4),
    )
    text = json.dumps(dataclasses.asdict(cfg))
    again = config.ModelConfig.from_json(json.loads(text))
    assert again == cfg and hash(again) == hash(cfg)
    plain = config.ModelConfig(**SIZES)
    text = json.dumps(dataclasses.asdict(plain))
    assert config.ModelConfig.from_json(json.loads(text)) == plain


def test_windowed_layers_alone_have_a_window():
    cfg = config.ModelConfig(
        **SIZES, sliding_window=7, windowed_layers=(True, False, True)
    )
    assert [cfg.window(i) for i in range(3)] == [7, None, 7]
    assert config.ModelConfig(**SIZES, sliding_window=7).window(0) is None
