"""What settings say of speculation becomes strategies, tuners and a drafter."""

import pytest

from tests import tiny_runs
from tests.rl import engines
from tlt_jax import speculation
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.drafters import io as drafter_io
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


def test_a_drafter_of_its_own_or_a_new_one(tmp_path):
    new = made().drafting_cfg
    assert new.capture and new.drafter_cfg.max_length == 14
    assert made().params is None and made().early_tuner is not None
    cfg = drafter.of_target(engines.CFG, max_length=4)
    params = drafter.init(cfg, engines.jax.random.key(0))
    drafter_io.save(tmp_path / "drafter", params, cfg)
    named = {"drafter.directory": str(tmp_path)}
    found = made(**named)
    assert found.params is not None
    # It will be trained on the run's texts, or else it must fit them as it is.
    assert found.drafting_cfg.drafter_cfg.max_length == 14
    kept = made(**named, **{"adaptation.enabled": False}).drafting_cfg
    assert kept.drafter_cfg.max_length == 4 and not kept.capture
    # Or it is used beyond what it was trained for, if that is asked for.
    longer = {"adaptation.enabled": False, "drafter.max_length": 20}
    assert made(**named, **longer).drafting_cfg.drafter_cfg.max_length == 20
    # Of another project's layout, whose texts may have any length.
    cfg = drafter.of_target(engines.CFG, architecture="eagle")
    eagle = drafter.init(cfg, engines.jax.random.key(1))
    drafter_hf.save(tmp_path / "hf", eagle, cfg, "eagle", engines.CFG)
    found = made(**{"drafter.directory": str(tmp_path / "hf")})
    assert found.drafting_cfg.drafter_cfg.architecture == "eagle"
    assert found.params.join.shape == eagle.join.shape
    with pytest.raises(ValueError, match="trained for 4"):
        kept.check(engines.CFG, 14, sampling.SamplingConfig())
