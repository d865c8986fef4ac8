"""The drafter learns the same on whatever devices it is put, and moves between them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.rl import engines
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.runtime import sharding
from tlt_jax.specdec.training import acceptance, objectives, unroll

CFG = drafter.of_target(engines.CFG, feature_layers=(0, 1), draft_vocab_size=12)
ROWS, TOKENS, BASES = 2, 24, 16


def batch_of(seed):
    """Two rows of one text each, with features that mean nothing."""
    rng = np.random.default_rng(seed)
    d = engines.CFG.d_model
    place = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, TOKENS))
    return unroll.Batch(
        tokens=rng.integers(3, 32, (ROWS, TOKENS)).astype(np.int32),
        positions=place.copy(),
        segment=np.zeros((ROWS, TOKENS), np.int32),
        features=rng.normal(size=(ROWS, TOKENS, 2 * d)).astype(np.float32),
        hidden=rng.normal(size=(ROWS, TOKENS, d)).astype(np.float32),
        bases=place[:, 4 : 4 + BASES].copy(),
        valid=np.ones((ROWS, BASES), bool),
        keys=rng.integers(0, 2**32, (ROWS, BASES, 2), dtype=np.uint32),
    )


@pytest.fixture(scope="module")
def learner():
    made = drafter_learner.DrafterLearner(
        CFG,
        objectives.Objective(2, token_loss="soft_ce"),
        optax.adam(1e-2),
        batch=batch_of(0),
        head_chunk=8,
        piece_bases=6,
        depth=2,
        dtype="float32",
    )
    made.draft_ids = np.arange(3, 15, dtype=np.int32)
    yield made
    made.pool.close()


def target():
    return jax.device_put(engines.PARAMS, jax.devices()[0])


def fresh(learner):
    norm = np.asarray(engines.PARAMS.final_norm)
    learner.state = learner.init_state(None, norm, seed=0)
    np.testing.assert_array_equal(learner.state.params.norm, norm)


def last(pieces):
    """Compute all pieces; return what they end with."""
    while True:
        try:
            jax.block_until_ready(next(pieces))
        except StopIteration as end:
            return jax.device_get(end.value)


def train(learner, places):
    """Take a step on each of `places`."""
    fresh(learner)
    outcomes = []
    for number, devices in enumerate(places):
        learner.begin(devices, target())
        outcomes.append(last(learner.step(batch_of(number))))
        held = jax.tree.leaves(learner._placed)[0].sharding.device_set
        assert held == set(devices)
    learner.end()
    return learner.state, [float(outcome["loss"]) for outcome in outcomes]


def test_the_devices_do_not_matter(learner):
    one, two, three = jax.devices()[:3]
    alone, losses = train(learner, [(one,)] * 3)
    assert int(alone.num_updates) == learner.num_updates == 3
    assert losses[0] != losses[1]
    moving, moved_losses = train(learner, [(two,), (one, two), (three, one)])
    np.testing.assert_allclose(moved_losses, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        moving.params,
        alone.params,
    )


def test_a_training_that_is_not_kept_changes_nothing(learner):
    before, _ = train(learner, [(jax.devices()[0],)])
    learner.begin((jax.devices()[0],), target())
    last(learner.step(batch_of(5)))
    learner.end(keep=False)
    assert learner.state is before
    weights = learner.weights("bfloat16")
    assert weights.join.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weights.draft_ids, learner.draft_ids)


def test_a_device_of_each_worker_as_many_as_divide_a_batch(learner):
    devices = jax.devices()
    meshes = [sharding.make_mesh(1, 1, 2, devices[2 * i : 2 * i + 2]) for i in range(3)]
    assert learner.devices_of(meshes[:1]) == (devices[0],)
    assert learner.devices_of(meshes[:2]) == (devices[0], devices[2])
    # Three do not divide two rows.
    assert learner.devices_of(meshes) == (devices[0], devices[2])


def test_what_drafts_would_have_had_accepted_is_measured(learner):
    fresh(learner)
    learner.begin((jax.devices()[0],), target())
    learner.sharpness, learner.tau = 7.0, 70.0
    found = last(learner.measure([batch_of(0)]))
    learner.end()
    assert found["sharpness"] in acceptance.SHARPNESSES
    assert learner.sharpness == learner.weights("float32").sharpness
    assert learner.sharpness == found["sharpness"]
    assert learner.tau == found["tau"] <= acceptance.TAUS[-1]
    assert learner.weights("bfloat16").tau == np.float32(found["tau"])
    assert 1 <= found["coupled/accept_length"] <= 3
    assert len(found["coupled/rate_by_depth"]) == 2
