"""The guard of steps: what is not finite changes nothing, too much of it ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tlt_jax.runtime import failures, train_state

OPTIMIZER = optax.adam(0.1)
STEP = jax.jit(functools.partial(train_state.step, optimizer=OPTIMIZER))


def state_of():
    return train_state.begin({"w": jnp.array([3.0, 4.0])}, OPTIMIZER)


def test_a_step_is_the_optimizers():
    grads = {"w": jnp.array([3.0, -4.0])}
    state, norm, skipped = STEP(state_of(), grads, 1.0)
    # Adam's first step is the rate against the gradient's sign.
    np.testing.assert_allclose(state.params["w"], [2.9, 4.1], rtol=1e-6)
    np.testing.assert_allclose(norm, 5.0)
    assert (int(state.num_updates), int(skipped)) == (1, 0)


@pytest.mark.parametrize(
    ("grad", "loss"),
    [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, -np.inf), (3e38, 1.0)],
)
def test_what_is_not_finite_changes_nothing(grad, loss):
    before, _, _ = STEP(state_of(), {"w": jnp.ones(2)}, 1.0)
    after, _, skipped = STEP(before, {"w": jnp.array([1.0, grad])}, loss)
    assert int(skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_so_many_in_a_row_end_the_training():
    skips = train_state.Skips(3)
    for skipped, expected in ((1, 1), (1, 2), (0, 0), (1, 1), (True, 2)):
        skips.count(skipped)
        assert skips.in_a_row == expected
        skips.check()
    skips.count(1)
    with pytest.raises(failures.TrainingError, match="3 updates in a row .*finite$"):
        skips.check()
    with pytest.raises(failures.TrainingError, match="not finite: train less"):
        skips.check("train less")


def test_an_average_follows_the_weights():
    """Of steps of 0.5 each: a decay of (1 + n) / (10 + n), then of 0.2 at most."""
    averaged = train_state.averaged(optax.sgd(0.5), 0.2)
    state = train_state.begin({"w": jnp.array([0.0])}, averaged)
    assert train_state.average_of(state) is state.opt_state.average
    wanted = weight = 0.0
    for kept in (1 / 10, 2 / 11, 0.2, 0.2):
        state, _, _ = train_state.step(state, {"w": jnp.array([-1.0])}, 1.0, averaged)
        weight += 0.5
        wanted = kept * wanted + (1 - kept) * weight
        np.testing.assert_allclose(state.params["w"], [weight], rtol=1e-6)
        found = train_state.average_of(state)["w"]
        np.testing.assert_allclose(found, [wanted], rtol=1e-6)
    # Where none is kept it is the weights themselves.
    plain = state_of()
    assert train_state.average_of(plain) is plain.params
