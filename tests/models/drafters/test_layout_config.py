"""The config.json of a published drafter: whose it is, in and out."""

import dataclasses

import pytest

from tests.models import published_drafters as published
from tlt_jax.models.drafters import drafter, layout_config, layouts

TARGET = published.TARGET


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, None),
        ({"architectures": None}, None),
        ({"architectures": ["LlamaForCausalLM"]}, None),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}, None),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}, "eagle"),
        (
            {
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": 1,
                "draft_vocab_size": 7,
            },
            "eagle3",
        ),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "eagle"),
        ({"architectures": ["Eagle3LlamaForCausalLM"]}, "eagle3"),
        ({"speculators_model_type": "eagle3", "architectures": ["X"]}, "speculators"),
    ],
)
def test_a_layout_is_told_by_its_classes(config, layout):
    assert layout_config.layout_of(config) == layout


def written(cfg, layout):
    return layout_config.to_config(
        cfg,
        layout,
        TARGET,
        dtype="bfloat16",
        verifier="org/name",
        num_speculative_tokens=4,
    )


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_what_is_written_reads_the_same(layout):
    cfg = drafter.of_target(
        TARGET,
        architecture=layouts.ARCHITECTURE_OF[layout],
        feature_layers=() if layout == "eagle" else (1, 3, 6),
        draft_vocab_size=0 if layout == "eagle" else 11,
        max_length=40,
    )
    cfg = dataclasses.replace(
        cfg,
        layer=dataclasses.replace(cfg.layer, d_ff=28, tie_embeddings=False),
        join_bias=layout == "eagle",
        own_head=layout != "eagle",
        norm_before_residual=layout == "speculators",
    )
    config = written(cfg, layout)
    assert layout_config.layout_of(config) == layout
    present = frozenset(layouts.TENSORS[layout])
    assert layout_config.from_config(config, layout, TARGET, present) == cfg


def test_layers_that_all_loaders_read_are_not_named():
    """SGLang gives a list another meaning from version to version."""
    three = dict(architecture="eagle3", draft_vocab_size=11)
    usual = drafter.of_target(TARGET, feature_layers=(1, 3, 4), **three)
    assert "eagle_config" not in written(usual, "eagle3")
    other = drafter.of_target(TARGET, feature_layers=(1, 3, 6), **three)
    nested = written(other, "eagle3")["eagle_config"]
    assert nested["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    # vLLM's list names what goes into a layer.
    config = written(other, "speculators")
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 7]
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/name",
        "architectures": ["Qwen3ForCausalLM"],
    }
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == 4


def test_windows_that_are_turned_off_are_not_read():
    present = frozenset(layouts.TENSORS["eagle"])
    windows = dict(sliding_window=4096, max_window_layers=1, use_sliding_window=False)
    config = published.CONFIGS["eagle"]
    plain = layout_config.from_config(config, "eagle", TARGET, present)
    assert (plain.join_bias, plain.max_length) == (True, 0)
    off = layout_config.from_config(config | windows, "eagle", TARGET, present)
    assert off == plain
    with pytest.raises(ValueError, match="window"):
        on = windows | {"use_sliding_window": True}
        layout_config.from_config(config | on, "eagle", TARGET, present)
