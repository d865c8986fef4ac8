"""What settings say of speculation becomes strategies, tuners and a drafter."""

import types

import pytest

from tests import tiny_runs
from tests.rl import engines
from tlt_jax import assembly, speculation
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.settings import schema
from tlt_jax.specdec import sampling, strategy

TLT = {"specdec.mode": "tlt", "drafter.features": "last"}


def made(**overrides):
    run = tiny_runs.config_of(**TLT | overrides)
    return speculation.of_run(run, engines.CFG)


def test_off_has_nothing():
    assert made(**{"specdec.mode": "off"}) == speculation.PLAIN


def test_settings_reach_the_tuners():
    one = {"specdec.strategies": ("2:D2K1V3",), "specdec.ngram_strategies": ()}
    found = made(**one, **{"specdec.tuner": "threshold", "specdec.hysteresis": 1})
    (tuner,) = found.tuners.values()
    assert tuner.state()["tuner"] == "threshold"
    chain = strategy.parse("D2K1V3")
    # It begins at two rows and goes on at three.
    assert [tuner.choose(n) for n in (4, 3, 2, 3, 4)] == [
        None,
        None,
        chain,
        chain,
        None,
    ]
    found = made(**one, **{"specdec.tuner": "beg_mab", "specdec.epsilon": 0.0})
    assert found.tuner.choose(1) == chain
    with pytest.raises(ValueError, match="has 2 candidates"):
        made(**{"specdec.tuner": "static", "specdec.strategies": ("2:D2K1V3,D3K1V4",)})


CHAINS = {"specdec.rule": "block", "specdec.strategies": ("2:D2K1V3",)}
# Tokens of which no clock decides.
COUNTED = {
    "specdec.tuner": "static",
    "specdec.ngram_strategies": (),
    "adaptation.max_steps": 2,
}


def test_a_rule_reaches_the_engines():
    assert made().speculator_cfg.rule == "keyed"
    cfg = made(**CHAINS, **{"specdec.ngram_strategies": ("2:D2K2V4-ngram",)})
    assert cfg.speculator_cfg.rule == "block"
    # What was sampled from no law it cannot judge.
    rules = [
        cfg.speculator_cfg.rule_of(strategy.parse(text))
        for text in (
            "D2K1V3",
            "D2K2V4-ngram",
        )
    ]
    assert rules == ["block", "keyed"]
    # Chains and trees, of which a tuner may choose by what was accepted.
    several = {"specdec.strategies": ("2:D2K1V3,D3K2V8",)}
    cfg = made(**{"specdec.rule": "rejection"}, **several).speculator_cfg
    assert cfg.rule == "rejection" and len(cfg.table.strategies()) == 2


@pytest.mark.parametrize("text", ["D3K2V8", "D3K1V4-ngram", "D3K1V7-both"])
def test_a_rule_refuses_candidates_that_are_no_chains_of_the_drafter(text):
    """A keyed one among them, too: a tuner must not choose by what its walk saw."""
    arms = {"specdec.strategies": (f"2:D2K1V3,{text}",)}
    with pytest.raises(schema.ConfigError) as raised:
        made(**CHAINS | arms)
    assert str(raised.value) == (
        "specdec.rule='block' judges whole chains that the learned drafter sampled, "
        f"and strategy {text} is none: use D3K1V4 (topk 1, tokens_to_verify = "
        "draft_depth + 1, proposer drafter), or rule='keyed'."
    )
    made(**arms)


@pytest.mark.parametrize(
    "changes,num_workers,reason",
    [
        ({"specdec.rule": "keyed", "specdec.tuner": "beg_mab"}, 2, ""),
        ({}, 1, ""),
        ({"specdec.tuner": "threshold"}, 1, ""),
        ({"adaptation.max_steps": 0, "adaptation.enabled": False}, 1, ""),
        ({"adaptation.max_steps": 0, "adaptation.max_frac": 0.0}, 1, ""),
        ({}, 2, "2 workers take requests as they come to them"),
        (
            {"specdec.tuner": "cost_model"},
            1,
            "specdec.tuner='cost_model' is told seconds (static and threshold look at "
            "rows)",
        ),
        (
            {"adaptation.max_steps": 0},
            1,
            "the drafter trains by the clock (adaptation.max_steps=0)",
        ),
        (
            {"specdec.ngram_strategies": ("2:D2K1V3-ngram",)},
            1,
            "when the drafter takes over from specdec.ngram_strategies depends on "
            "texts that no checkpoint keeps",
        ),
    ],
)
def test_it_is_said_what_clocks_decide(changes, num_workers, reason):
    run = tiny_runs.config_of(**TLT | CHAINS | COUNTED | changes)
    told = reason and (
        "specdec.rule='block' keeps the law of tokens and not the tokens: repeated or "
        f"resumed, this run draws others, as {reason} (see docs/sampling.md)."
    )
    assert speculation.by_the_clock(run, num_workers) == told


def test_all_that_clocks_decide_is_one_line():
    run = tiny_runs.config_of(**TLT | CHAINS)
    told = speculation.by_the_clock(run, 1)
    assert told.count("; ") == 2 and "\n" not in told
    # A drafter that is ready at once takes over from nothing.
    named = tiny_runs.config_of(**TLT | CHAINS, **{"drafter.directory": "somewhere"})
    assert speculation.by_the_clock(named, 1).count("; ") == 1


def test_a_block_is_as_deep_as_the_deepest_strategy(tmp_path):
    arms = {"specdec.strategies": ("1:D5K1V6,D2K1V3", "2:D3K1V4")}
    named = TLT | arms | {"drafter.architecture": "block", "adaptation.name": "eagle"}
    found = made(**named).speculator_cfg.drafter_cfg
    # No objective that regresses features trains it.
    assert (found.block_size, found.output_norm) == (5, True)
    cfg = made(**named, **{"drafter.block_size": 4}).speculator_cfg
    with pytest.raises(ValueError) as raised:
        cfg.check(engines.CFG, 14, sampling.SamplingConfig())
    assert str(raised.value) == (
        "strategy D5K1V6 drafts 5 tokens deep, but this drafter guesses blocks of 4: "
        "name strategies of at most D4, or train one with drafter.block_size=5."
    )
    with pytest.raises(schema.ConfigError, match="drafts of 33 tokens: a pass guesses"):
        made(**named | {"specdec.strategies": ("1:D33K1V34",)})
    params = drafter.init(cfg.drafter_cfg, engines.jax.random.key(0))
    drafter_io.save(tmp_path / "drafter", params, cfg.drafter_cfg)
    loaded = speculation.load(str(tmp_path), engines.CFG).speculator_cfg
    table = [(most, *map(str, arms)) for most, arms in loaded.table.entries]
    assert table == [(1, "D4K1V5"), (4, "D4K1V5"), (16, "D3K1V4")]


def test_an_engines_scores_are_part_of_what_a_run_keeps():
    found = made(**TLT)
    assert set(found.changing) == {"tuner", "early_tuner", "calibration"}
    assert set(made(**TLT | {"specdec.mode": "ngram"}).changing) == {"tuner"}
    letters = types.SimpleNamespace(eos_ids=(), decoder_for=lambda stop: None)
    sizes = dict(max_rows=4, max_length=14)
    one = assembly.engine_of(engines.CFG, letters, found, **sizes)
    one._speculator._calibration.begin(7, 2.0, 1.5)
    (told,) = found.changing["calibration"].state()["engines"]
    assert told == one._speculator._calibration.state() and told["version"] == 7


def test_a_drafter_of_its_own_or_a_new_one(tmp_path):
    new = made().speculator_cfg
    assert new.capture and new.drafter_cfg.max_length == 14
    assert made().params is None and made().early_tuner is not None
    cfg = drafter.of_target(engines.CFG, max_length=4)
    params = drafter.init(cfg, engines.jax.random.key(0))
    drafter_io.save(tmp_path / "drafter", params, cfg)
    named = {"drafter.directory": str(tmp_path)}
    found = made(**named)
    assert found.params is not None
    # It will be trained on the run's texts, or else it must fit them as it is.
    assert found.speculator_cfg.drafter_cfg.max_length == 14
    kept = made(**named, **{"adaptation.enabled": False}).speculator_cfg
    assert kept.drafter_cfg.max_length == 4 and not kept.capture
    # Or it is used beyond what it was trained for, if that is asked for.
    longer = {"adaptation.enabled": False, "drafter.max_length": 20}
    assert made(**named, **longer).speculator_cfg.drafter_cfg.max_length == 20
    # Of another project's layout, whose texts may have any length.
    cfg = drafter.of_target(engines.CFG, architecture="eagle")
    eagle = drafter.init(cfg, engines.jax.random.key(1))
    drafter_hf.save(tmp_path / "hf", eagle, cfg, "eagle", engines.CFG)
    found = made(**{"drafter.directory": str(tmp_path / "hf")})
    assert found.speculator_cfg.drafter_cfg.architecture == "eagle"
    assert found.params.join.shape == eagle.join.shape
    with pytest.raises(ValueError, match="trained for 4"):
        kept.check(engines.CFG, 14, sampling.SamplingConfig())
