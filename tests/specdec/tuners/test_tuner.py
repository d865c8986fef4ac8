"""Arms, the fixed rules, the factory: what is chosen, listed, kept and refused."""

import json

import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import build as tuners
from tlt_jax.specdec.tuners import tuner

ARMS = strategy.parse_arms(("1:D3K1V4,D7K1V8", "4:D3K1V4,D2K2V5"))
TABLE = strategy.parse_arms(("2:D7K1V8", "4:D3K1V4"))
D7, D3 = strategy.parse("D7K1V8"), strategy.parse("D3K1V4")


def test_arms_are_read_and_looked_up():
    assert [[str(s) for s in ARMS.of(n)] for n in (1, 2, 4, 5)] == [
        ["D3K1V4", "D7K1V8"],
        ["D3K1V4", "D2K2V5"],
        ["D3K1V4", "D2K2V5"],
        [],
    ]
    assert [ARMS.entry_of(n) for n in (1, 2, 4, 5)] == [0, 1, 1, None]
    assert [str(s) for s in ARMS.strategies()] == ["D3K1V4", "D7K1V8", "D2K2V5"]
    assert strategy.parse_arms(()).of(1) == ()


def test_arms_of_one_candidate_are_a_table():
    TABLE.check_single()
    assert [TABLE.first(n) for n in (1, 2, 3, 4, 5)] == [D7, D7, D3, D3, None]
    with pytest.raises(ValueError, match="1:D3K1V4,D7K1V8 has 2 candidates"):
        ARMS.check_single()
    for name in ("static", "threshold"):
        with pytest.raises(ValueError, match="1:D3K1V4,D7K1V8 has 2 candidates"):
            tuners.build(name, ARMS, max_rows=8, seed=0)


@pytest.mark.parametrize(
    "entries,message",
    [
        (("D3K1V4",), "is not <largest number of rows>:<strategy>,<strategy>"),
        (("2:",), "is not <largest number of rows>:<strategy>,<strategy>"),
        (("2:D3K1V4,",), "not of the form D<draft_depth>"),
        (("2:D3K1V4,D3K1V4",), "entry 2:D3K1V4,D3K1V4 names a strategy twice"),
        (("4:D3K1V4", "2:D3K1V4"), "the smallest first"),
    ],
)
def test_malformed_arms_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        strategy.parse_arms(entries)


def test_a_static_tuner_follows_its_table():
    made = tuners.build(
        "static", strategy.parse_arms(("4:D3K1V4",)), max_rows=8, seed=0
    )
    assert [made.choose(n) for n in (1, 4, 5)] == [D3, D3, None]
    assert made.strategies(4) == (D3,) and made.strategies(5) == (None,)


def test_the_threshold_has_hysteresis():
    made = tuner.Threshold(TABLE, start_rows=4, stop_rows=6)
    script = [
        (8, None),
        (5, None),  # Not yet fallen to the threshold.
        (4, D3),
        (5, D3),  # It goes on above the threshold,
        (6, D3),
        (7, None),  # but not for ever,
        (6, None),  # nor does it begin there again.
        (4, D3),
        (2, D7),
        (5, D3),
    ]
    assert [made.choose(rows) for rows, _ in script] == [want for _, want in script]
    # What may be chosen, and so is compiled, is all of that and no more.
    assert [made.strategies(n) for n in (1, 3, 4, 5, 6, 7)] == [
        (D7,),
        (D3,),
        (D3,),
        (D3, None),
        (D3, None),
        (None,),
    ]


def test_every_engine_has_a_threshold_of_its_own():
    """One has few rows left; another, in between, does not begin for that."""
    made = tuner.Threshold(TABLE, start_rows=4, stop_rows=6)
    few, many = made.for_engine(), made.for_engine()
    assert few.choose(4) == D3 and many.choose(5) is None
    assert few.choose(5) == D3
    state = json.loads(json.dumps(made.state()))
    other = tuner.Threshold(TABLE, start_rows=4, stop_rows=6)
    few, many, third = (other.for_engine() for _ in range(3))
    other.restore(state)
    assert [own.choose(5) for own in (few, many, third)] == [D3, None, None]
    # A tuner that learns is one for all.
    static = tuner.Static(TABLE)
    assert static.for_engine() is static


def test_a_threshold_goes_on_where_it_was():
    made = tuner.Threshold(TABLE, start_rows=4, stop_rows=6)
    made.choose(4)
    state = json.loads(json.dumps(made.state()))
    other = tuner.Threshold(TABLE, start_rows=4, stop_rows=6)
    assert other.choose(5) is None
    other.restore(state)
    assert other.choose(5) == D3


def test_accept_length_of_a_call():
    call = tuner.Call(2, 2, D3, 0.1, 3, 9, (4, 3, 1, 0))
    assert call.accept_length == 2.0
    assert tuner.Call(2, 2, None, 0.1, 3, 6).accept_length == 1.0
