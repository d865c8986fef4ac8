"""Settings of speculation and its drafter: names, defaults, ranges, contradictions."""

import pytest

from tests.settings import tables
from tlt_jax.settings import schema, speculation

# By section and key: the default, and the range as a mathematician writes it.
SETTINGS = {
    speculation.Specdec: {
        "mode": ("off", ""),
        "strategies": (("1:D7K1V8,D3K1V4", "4:D5K1V6", "16:D3K1V4"), ""),
        "ngram_strategies": (("2:D6K1V7-ngram", "8:D4K1V5-ngram"), ""),
        "tuner": ("cost_model", ""),
        "threshold": (0, "[0, 65536]"),
        "hysteresis": (0, "[0, 65536]"),
        "epsilon": (0.1, "[0, 1]"),
        "window": (300, "[1, 1000000]"),
        "ranking": ("coupled", ""),
        "tau": (None, "[0.001, 1000]"),
        "rule": ("keyed", ""),
    },
    speculation.DrafterShape: {
        "architecture": ("tlt", ""),
        "features": ("low_mid_high", ""),
        "feature_layers": ((), ""),
        "draft_vocab_size": (0, "[0, 10000000]"),
        "block_size": (0, "[0, 32]"),
    },
    speculation.Drafter: {
        "architecture": ("tlt", ""),
        "features": ("low_mid_high", ""),
        "feature_layers": ((), ""),
        "draft_vocab_size": (0, "[0, inf)"),
        "block_size": (0, "[0, 32]"),
        "directory": ("", ""),
        "max_length": (0, "[0, 10000000]"),
    },
    speculation.Objective: {
        "name": ("eagle3", ""),
        "num_steps": (None, "[1, 256]"),
        "decay": (None, "[1e-06, 1]"),
        "token_loss": (None, ""),
    },
    speculation.Adaptation: {
        "name": ("eagle3", ""),
        "num_steps": (None, "[1, 256]"),
        "decay": (None, "[1e-06, 1]"),
        "token_loss": (None, ""),
        "enabled": (True, ""),
        "learning_rate": (None, "(0, 1e+30]"),
        "warmup_steps": (20, "[0, 1000000000]"),
        "num_rows": (1, "[1, 1000000]"),
        "row_tokens": (512, "[3, 100000000]"),
        "row_bases": (320, "[1, 10000000]"),
        "head_chunk": (256, "[1, 10000000]"),
        "piece_bases": (64, "[0, 10000000]"),
        "capture_frac": (1.0, "[0, 1]"),
        "buffer_mb": (1024, "[1, 16777216]"),
        "spill_mb": (0, "[0, 1073741824]"),
        "max_age": (1, "[0, 1000000000]"),
        "previous_frac": (0.5, "[0, 1]"),
        "publish_steps": (0, "[0, 1000000000]"),
        "max_frac": (0.2, "[0, 1000000]"),
        "max_steps": (0, "[0, 1000000000]"),
    },
    speculation.Workers: {
        "num": (1, "[1, 1024]"),
        "placement": ("colocated", ""),
        "min_idle": (1, "[1, 1024]"),
        "timeout_s": (900.0, "[0.001, 604800]"),
    },
}


@pytest.mark.parametrize("section", SETTINGS, ids=lambda section: section.__name__)
def test_defaults_and_ranges(section):
    tables.check(section, SETTINGS[section])


CHOICES = {
    (speculation.Specdec, "mode"): "off ngram tlt",
    (speculation.Specdec, "tuner"): (
        "static threshold beg_mab cost_model package.module:Name"
    ),
    (speculation.Specdec, "ranking"): "coupled deterministic",
    (speculation.Specdec, "rule"): "keyed rejection block",
    (speculation.DrafterShape, "architecture"): "tlt eagle eagle3 block",
    (speculation.DrafterShape, "features"): "last low_mid_high layers",
    (speculation.Objective, "name"): "eagle hass eagle3",
    (
        speculation.Objective,
        "token_loss",
    ): "soft_ce kl tv lk_hybrid package.module:Name",
}


@pytest.mark.parametrize("key", CHOICES, ids=tables.named)
def test_choices(key):
    tables.check_choices(*key, CHOICES[key])


def test_only_what_is_set_overrides_the_objectives_preset():
    assert speculation.Objective(name="hass").overrides() == {}
    chosen = {"decay": 0.5, "token_loss": "tv"}
    assert speculation.Objective(**chosen).overrides() == chosen
    # Of a training during a run the objective's settings alone.
    adapted = speculation.Adaptation(learning_rate=1e-3, num_rows=3, num_steps=2)
    assert adapted.overrides() == {"num_steps": 2}


@pytest.mark.parametrize("mode", ["off", "ngram"])
def test_a_chain_rule_needs_a_learned_drafter(mode):
    speculation.check_rule(speculation.Specdec(mode=mode))
    speculation.check_rule(speculation.Specdec(mode="tlt", rule="block"))
    with pytest.raises(schema.ConfigError) as raised:
        speculation.check_rule(speculation.Specdec(mode=mode, rule="block"))
    assert str(raised.value) == (
        f"specdec.rule='block' with specdec.mode='{mode}': it judges what a learned "
        "drafter has sampled, and there is none. Set specdec.mode=tlt, or "
        "specdec.rule=keyed."
    )


SHAPES = [
    # Features, layers, whether tlt, eagle, eagle3 and block take them.
    ("last", (), (True, True, False, True)),
    ("low_mid_high", (), (True, False, True, True)),
    ("layers", (0, 4), (True, False, False, True)),
    ("layers", (0, 2, 4), (True, False, True, True)),
]


@pytest.mark.parametrize("features,layers,fits", SHAPES)
def test_an_architecture_takes_the_layers_that_it_knows(features, layers, fits):
    names = "tlt", "eagle", "eagle3", "block"
    for architecture, taken in zip(names, fits, strict=True):
        shape = speculation.DrafterShape(architecture, features, layers)
        if taken:
            speculation.check_shape(shape)
            continue
        with pytest.raises(schema.ConfigError) as raised:
            speculation.check_shape(shape)
        assert str(raised.value) == (
            f"drafter.architecture='{architecture}' with drafter.features="
            f"'{features}', feature_layers={layers}: eagle reads the last feature "
            "(features='last'), eagle3 three layers ('low_mid_high')."
        )


def test_blocks_have_a_size_and_other_drafters_none():
    speculation.check_shape(speculation.DrafterShape("block", "last", block_size=4))
    with pytest.raises(schema.ConfigError) as raised:
        speculation.check_shape(speculation.DrafterShape("tlt", "last", block_size=4))
    assert str(raised.value) == (
        "drafter.block_size=4 with drafter.architecture='tlt': it is of architecture "
        "block; leave it out, or set drafter.architecture=block."
    )


@pytest.mark.parametrize("features,layers", [("layers", ()), ("last", (1,))])
def test_layers_are_named_where_they_are_read_and_only_there(features, layers):
    with pytest.raises(schema.ConfigError) as raised:
        speculation.check_shape(speculation.Drafter("tlt", features, layers))
    assert str(raised.value) == (
        f"drafter.features='{features}' with drafter.feature_layers={layers}: name "
        "layers with features='layers', and only then."
    )
