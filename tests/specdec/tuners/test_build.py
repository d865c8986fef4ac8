"""Tuners by name: which settings reach which tuner, and what is refused."""

import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import bandit, cost_model, tuner
from tlt_jax.specdec.tuners import build as tuners

ARMS = strategy.parse_arms(("1:D3K1V4,D7K1V8", "4:D3K1V4,D2K2V5"))
D7, D3 = strategy.parse("D7K1V8"), strategy.parse("D3K1V4")


def test_the_threshold_is_the_last_entry_unless_given():
    arms = strategy.parse_arms(("2:D7K1V8", "4:D3K1V4"))
    made = tuners.build("threshold", arms, max_rows=64, seed=0)
    assert made.choose(5) is None and made.choose(4) == D3
    made = tuners.build(
        "threshold", arms, max_rows=64, seed=0, threshold=32, hysteresis=8
    )
    assert [made.choose(n) for n in (33, 32, 40, 41)] == [None, D3, D3, None]


@pytest.mark.parametrize(
    "name,arms,options,message",
    [
        ("ucb", ARMS, {}, "tuner 'ucb' is unknown: use one of static, threshold"),
        ("static", ARMS, {}, "has 2 candidates"),
        ("threshold", ARMS, {}, "has 2 candidates"),
        ("threshold", strategy.Arms(()), {}, "'threshold' has no strategy"),
        (
            "threshold",
            strategy.parse_arms(("4:D3K1V4",)),
            {"hysteresis": -1},
            "start_rows=4 and stop_rows=3",
        ),
        ("beg_mab", ARMS, {"epsilon": 1.5}, "epsilon=1.5"),
        ("beg_mab", ARMS, {"window": 0}, "window=0"),
    ],
)
def test_what_cannot_be_built_is_refused(name, arms, options, message):
    with pytest.raises(ValueError, match=message):
        tuners.build(name, arms, max_rows=8, seed=0, **options)


@pytest.mark.parametrize("name", tuners.NAMES)
def test_a_state_of_another_tuner_is_refused(name):
    arms = strategy.parse_arms(("4:D3K1V4",))
    made = tuners.build(name, arms, max_rows=8, seed=0)
    with pytest.raises(
        ValueError, match=f"'other' and cannot be continued by '{name}'"
    ):
        made.restore(made.state() | {"tuner": "other"})


def test_names():
    assert tuners.NAMES == ("static", "threshold", "beg_mab", "cost_model")


def test_the_bandits_settings_reach_it():
    arms = strategy.parse_arms(("4:D3K1V4,D7K1V8",))

    def play(made):
        for rows, accepted in ((2, (2, 2, 2, 2)), (3, (3, 0, 0, 0)), (1, (1, 1, 0, 0))):
            made.record(tuner.Call(rows, 4, D3, 0.1, 1, 1, accepted))
        return [made.choose(2) for _ in range(30)], made.state()

    settings = {"seed": 11, "epsilon": 0.4, "window": 2}
    found = play(tuners.build("beg_mab", arms, max_rows=8, **settings))
    assert found == play(bandit.BegMab(arms, **settings))
    for name, value in (("seed", 12), ("epsilon", 0.1), ("window", 300)):
        other = settings | {name: value}
        assert found != play(tuners.build("beg_mab", arms, max_rows=8, **other)), name


def test_the_cost_models_settings_reach_it():
    cfg = cost_model.CostModelConfig(window=2)
    arms = strategy.parse_arms(("8:D3K1V4,D7K1V8",))
    made = tuners.build("cost_model", arms, max_rows=6, seed=0, cfg=cfg)
    for elapsed_s in (0.1, 0.3, 0.2):
        made.record(tuner.Call(5, 6, None, elapsed_s, 1, 5))
    assert made.state()["step_times"] == [[6, None, [0.3, 0.2]]]
    # Five rows are of the largest bucket, which is six.
    assert made.choose(5) in (D3, D7)
    other = tuners.build("cost_model", arms, max_rows=8, seed=0)
    other.restore(made.state())
    assert other.choose(5) is None


class Own:
    """A tuner from outside: it keeps what it was given."""

    def __init__(self, arms, *, max_rows, seed):
        self.given = arms, max_rows, seed


def test_a_tuner_of_ones_own():
    made = tuners.build(f"{__name__}:Own", ARMS, max_rows=6, seed=5, window=2)
    assert made.given == (ARMS, 6, 5)
    with pytest.raises(ValueError, match="has no 'Onw'; did you mean 'Own'"):
        tuners.build(f"{__name__}:Onw", ARMS, max_rows=6, seed=5)
