"""A drafter's tau and sharpness follow what becomes of its drafts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.specdec import calibration
from tlt_jax.specdec import candidates as candidates_lib


def share(logs, logits, noise, ids):
    tau, sharpness = jnp.exp(logs)
    return jax.nn.log_softmax((sharpness * logits + noise) / tau)[ids]


def test_slopes_are_the_derivatives_of_shares():
    rng = np.random.default_rng(0)
    logits, noise = 3 * rng.standard_normal((2, 4, 50)).astype(np.float32)
    logs = np.log(np.float32([0.6, 1.5]))
    ids = np.argsort(-noise, axis=-1)[:, :3]
    factor = np.exp(logs[1] - logs[0])
    scores = factor * logits + noise / np.exp(logs[0])
    found = jax.jit(calibration.slopes)(logits, scores, ids, factor)
    assert found.by_tau.shape == found.by_sharpness.shape == (4, 3)
    for row in range(4):
        wanted = jax.jacobian(share)(logs, logits[row], noise[row], ids[row])
        both = np.stack([found.by_tau[row], found.by_sharpness[row]], axis=-1)
        np.testing.assert_allclose(both, wanted, rtol=2e-4, atol=2e-5)


def test_evidence_is_of_those_whose_parent_came_true():
    """Two levels of two, drawn 5 7; the third row took no part."""
    found = candidates_lib.Candidates(
        tokens=np.array([[5, 6, 7, 8]] * 3),
        parents=np.array([[-1, -1, 0, 1]] * 3),
        depths=np.array([[1, 1, 2, 2]] * 3),
        scores=np.log([[0.5, 0.25, 0.4, 0.125], [0.5, 1e-9, 0.4, 1e-9], [0.5] * 4]),
    )
    # What is absent was not there to come true.
    found = found.replace(scores=jnp.where(found.scores > -9, found.scores, -jnp.inf))
    drawn, counts = np.array([[5, 7, 9]] * 3), np.array([3, 1, 0])
    slopes = calibration.Slopes(jnp.full((3, 4), -2.0), jnp.full((3, 4), 3.0))
    seen = calibration.evidence(found, slopes, drawn, counts)
    # Of the first row's: chance, and 1 where it came true; of the second's one.
    tried = np.array([(0.5, 1), (0.25, 0), (0.8, 1), (0.5, 1)])
    off = np.sum(tried[:, 0] * (tried[:, 1] - tried[:, 0]))
    np.testing.assert_allclose(seen.pull, off * np.array([-2, 3]), rtol=1e-6)
    weight = np.sum(tried[:, 0] ** 2) * np.array([[4, -6], [-6, 9]])
    np.testing.assert_allclose(seen.weight, weight, rtol=1e-6)


class World:
    """A target whose law a drafter's score describes, by tau and sharpness known."""

    def __init__(self, tau, sharpness, seed=0):
        self.logs, self.rng = np.log([tau, sharpness]), np.random.default_rng(seed)

    def call(self, own, num=64):
        """Evidence of the best guesses of so many positions; hits; mean chance."""
        logits = 2 * self.rng.standard_normal((num, 40)).astype(np.float32)
        noise = self.rng.gumbel(size=(num, 40)).astype(np.float32)
        tau, sharpness = own.tau, own.sharpness
        scores = (sharpness * logits + noise) / tau
        ids = np.argmax(scores, axis=-1)[:, None]
        chances = np.take_along_axis(np.asarray(jax.nn.softmax(scores)), ids, 1)[:, 0]
        tau, sharpness = np.exp(self.logs)
        unknown = tau * self.rng.gumbel(size=(num, 40))
        drawn = np.argmax(sharpness * logits + noise + unknown, axis=-1)
        true = drawn == ids[:, 0]
        factor = own.sharpness / own.tau
        slopes = calibration.slopes(logits, scores, ids, factor)
        slopes = np.stack([slopes.by_tau[:, 0], slopes.by_sharpness[:, 0]])
        slopes = slopes * chances
        seen = calibration.Evidence(slopes @ (true - chances), slopes @ slopes.T)
        return seen, true.mean(), chances.mean()


def follow(own, world, num_runs, num_calls=10):
    """The last run's hits and mean chance."""
    for _ in range(num_runs):
        own.begin_run()
        told = []
        for _ in range(num_calls):
            seen, *rates = world.call(own)
            own.record(seen)
            told.append(rates)
    return np.mean(told, axis=0)


@pytest.mark.parametrize("tau,sharpness", [(0.3, 1.0), (2.4, 1.0), (0.6, 1.8)])
def test_numbers_that_do_not_fit_come_back(tau, sharpness):
    """Of a target with tau 0.6 and sharpness 1.2: half, four times, and a half more."""
    own, world = calibration.Calibration(), World(0.6, 1.2)
    own.begin(3, tau, sharpness)
    _, true, chance = world.call(own, 2000)
    assert abs(true - chance) > 0.08
    true, chance = follow(own, world, num_runs=8)
    assert abs(true - chance) < 0.03
    assert own.tau == pytest.approx(0.6, rel=0.15)
    assert own.sharpness == pytest.approx(1.2, rel=0.15)


def test_a_few_drafts_say_little_and_all_runs_forget():
    own, world = calibration.Calibration(), World(0.6, 1.2)
    own.begin(0, 0.6, 1.2)
    assert (own.tau, own.sharpness) == (np.float32(0.6), np.float32(1.2))
    for _ in range(5):
        seen, *_ = world.call(own, 8)
        own.record(seen)
        assert own.tau == pytest.approx(0.6, rel=0.1)
        # Not before the next run.
        assert own.sharpness == np.float32(1.2)
    follow(own, World(2.0, 1.2), num_runs=3)
    assert own.tau > 1.2
    follow(own, World(0.6, 1.2), num_runs=12)
    assert own.tau == pytest.approx(0.6, rel=0.15)


def test_one_call_goes_no_further_than_its_steps_and_bounds():
    own = calibration.Calibration()
    own.begin(0, 1.0, 1.0)
    weight = np.diag([0.0, 0.0])
    for _ in range(2):
        own.record(calibration.Evidence(np.array([1e9, 1e9]), weight))
    assert own.tau == np.float32(np.exp(0.8)) and own.sharpness == 1
    own.record(calibration.Evidence(np.array([np.nan, 0]), weight))
    assert own.tau == np.float32(np.exp(0.8))
    for _ in range(9):
        own.record(calibration.Evidence(np.array([1e9, 1e9]), weight))
        own.begin_run()
    assert (own.tau, own.sharpness) == pytest.approx((16, 8))


def test_a_version_begins_as_it_was_measured():
    own, world = calibration.Calibration(), World(2.0, 1.2)
    own.begin(0, 0.5, 1.0)
    follow(own, world, 2)
    learned = own.tau, own.sharpness
    # Told once more, as after a restart: all goes on.
    before = own.state()
    own.begin(0, 0.5, 1.0)
    assert own.state() == before
    # Another one that was not measured anew begins there, with as much to learn.
    own.begin(1, 0.5, 1.0)
    assert (own.tau, own.sharpness) == learned
    assert own.state() != before
    own.begin(2, 0.7, 1.5)
    assert (own.tau, own.sharpness) == (np.float32(0.7), np.float32(1.5))
    # Measured anew, of one version.
    own.begin(2, 0.7, 1.25)
    assert own.sharpness == np.float32(1.25)


def test_state_goes_on_and_engines_do_not_mix():
    def made():
        whole = calibration.Calibration()
        engines = [whole.for_engine() for _ in range(2)]
        for own in engines:
            own.begin(4, 0.5, 1.0)
        return whole, engines

    whole, engines = made()
    worlds = World(2.0, 1.2), World(0.3, 2.0, seed=1)
    for own, world in zip(engines, worlds, strict=True):
        follow(own, world, 2)
    assert engines[0].tau > 1 > engines[1].tau
    told = json.loads(json.dumps(whole.state()))
    again, others = made()
    again.restore(told)
    assert again.state() == whole.state()
    for own, other in zip(engines, others, strict=True):
        seen, *_ = World(1.0, 1.0).call(own)
        for one in (own, other):
            one.begin_run()
            one.record(seen)
        assert (own.tau, own.sharpness) == (other.tau, other.sharpness)
    # As many as there are; more begin anew.
    more = calibration.Calibration()
    more.restore(told)
    assert more.for_engine().state()["version"] is None
