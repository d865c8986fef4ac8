"""Chances of drafts follow what becomes of them, in an engine that decodes."""

import numpy as np
import pytest

from tests.rl import engines
from tests.rl.engine import test_engine_speculation as speculation
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.specdec import strategy

# Four rows share ten nodes of 16.
SHARED = dict(table=strategy.parse_arms(("4:D3K1V4N10",)))
SIZES = dict(page_size=4, prefill_chunk=8, steps_per_call=8)


@pytest.fixture(scope="module")
def engine():
    made = speculation.engine_of("chain", speculation.DRAFTER, SHARED, **SIZES)
    yield made
    made.pool.close()


def give(engine, tau, sharpness, version):
    params = speculation.drafter_params(speculation.DRAFTER)
    numbers = dict(tau=np.float32(tau), sharpness=np.float32(sharpness))
    engine.set_drafter(params.replace(**numbers), version)


def run(engine, num_runs=1):
    """Drafts accepted in the last run, what came true of tried ones, and chances."""
    for _ in range(num_runs):
        completions, stats = engine.run(engines.REQUESTS, engines.SEED)
    tried, chance, true = map(np.sum, stats.reliability)
    digest = sum(int(one.tokens.sum()) for one in completions)
    return sum(stats.num_accepted[1:]), true / tried, chance / tried, digest, stats


# Tau and sharpness that this drafter has earned; what is accepted with them.
TAU, SHARPNESS, ACCEPTED = 1.1, 0.7, 39


@pytest.mark.parametrize("version,factor", [(1, 0.5), (2, 2.0)])
def test_a_tau_that_does_not_fit_comes_back(engine, version, factor):
    give(engine, TAU, SHARPNESS, version=-version)
    accepted, true, chance, digest, _ = run(engine)
    assert accepted == ACCEPTED and abs(true - chance) < 0.03
    give(engine, factor * TAU, SHARPNESS, version)
    assert engine._speculator._calibration.tau == np.float32(factor * TAU)
    _, true, chance, other, _ = run(engine)
    assert abs(true - chance) > 0.1 and other == digest
    accepted, true, chance, other, stats = run(engine, 10)
    assert abs(true - chance) < 0.04 and other == digest
    assert abs(accepted - ACCEPTED) <= 2
    assert stats.taus == [pytest.approx(TAU, rel=0.1)]
    assert stats.sharpnesses == [pytest.approx(SHARPNESS, abs=0.2)]


def test_the_sharpness_of_a_run_is_the_one_that_it_began_with(engine):
    """A drafter that guesses at random is better ranked by the noise alone."""
    give(engine, TAU, 1.0, version=3)
    told, inputs = [], engine._speculator.inputs

    def watched(*args):
        told.append(inputs(*args))
        return told[-1]

    engine._speculator.inputs = watched
    try:
        first, *_ = run(engine)
        num_calls = len(told)
        last, *_ = run(engine, 6)
    finally:
        del engine._speculator.inputs
    assert num_calls > 4 and len({float(x.tau) for x in told[:num_calls]}) > 4
    assert {float(x.sharpness) for x in told[:num_calls]} == {1.0}
    assert told[num_calls].sharpness < 0.99 and told[-1].sharpness < 0.85
    assert (first, last) == (36, 37)


def test_a_tau_that_is_given_stays():
    more = SHARED | dict(tau=2.25)
    engine = speculation.engine_of("chain", speculation.DRAFTER, more, **SIZES)
    state = engine._speculator._calibration.state()
    *_, stats = run(engine, 2)
    assert (stats.taus, stats.sharpnesses) == ([2.25], [1.0])
    assert engine._speculator._calibration.state() == state
    engine.pool.close()


def test_matches_have_chances_on_the_same_scale(monkeypatch):
    """Texts of one seed, and so drawn before: what matches do is known by and by."""
    engine = speculation.engine_of("ngram", None, **SIZES)
    counted, kept = [], engine_lib.Engine._kept

    def watched(engine, rows, result):
        counted[-1] += result.reliability
        return kept(engine, rows, result)

    monkeypatch.setattr(engine_lib.Engine, "_kept", watched)
    for _ in range(6):
        counted.append(np.zeros((3, 10), np.float32))
        engine.run(engines.REQUESTS, 0)
    engine.pool.close()
    (tried, chance, true), first = counted[-1], counted[0]
    # Of those that nothing is known of few come true, and few were said to.
    assert np.sum(first[1:], axis=1) / np.sum(first[0]) == pytest.approx(0, abs=0.15)
    assert np.sum(true) / np.sum(tried) == pytest.approx(0.75, abs=0.05)
    assert abs(np.sum(true) - np.sum(chance)) < 0.08 * np.sum(tried)
    # From one end of the scale to the other.
    assert min(tried[0], tried[9]) > 15
    assert np.all(np.abs(true - chance)[[0, 9]] < 0.1 * tried[[0, 9]])
