"""Losses of single positions against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.specdec.training import losses as drafter_losses

# Logits shifted by a constant are the same laws.
TARGET = jnp.log(jnp.array([0.5, 0.25, 0.25])) + 2.0
DRAFT = jnp.log(jnp.array([0.25, 0.25, 0.5])) - 1.0
LN2 = float(np.log(2.0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # .5 ln 4 + .25 ln 4 + .25 ln 2
        ("soft_ce", 1.75 * LN2),
        # .5 ln 2 - .25 ln 2
        ("kl", 0.25 * LN2),
        ("tv", 0.25),
        # exp(-3 x .75) = .10540
        ("lk_hybrid", 0.10539922 * 0.25 * LN2 + 0.89460078 * 0.25),
    ],
)
def test_loss_of_two_known_laws(name, expected):
    compute = jax.jit(drafter_losses.token_loss, static_argnums=0)
    for function in (drafter_losses.token_loss, compute):
        np.testing.assert_allclose(function(name, TARGET, DRAFT), expected, rtol=1e-6)


def test_loss_of_equal_laws_is_zero_and_flat():
    for name in ("kl", "tv", "lk_hybrid"):
        value, slope = jax.value_and_grad(
            lambda draft, name=name: drafter_losses.token_loss(name, TARGET, draft)
        )(TARGET)
        assert abs(value) < 1e-7
        np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_soft_cross_entropy_pulls_towards_the_target():
    slope = jax.grad(drafter_losses.soft_cross_entropy, argnums=1)(TARGET, DRAFT)
    np.testing.assert_allclose(slope, [-0.25, 0.0, 0.25], atol=1e-6)


def test_hybrid_ends_are_kl_and_tv_and_its_weight_is_constant():
    args = (TARGET, DRAFT)
    hybrid = drafter_losses.lk_hybrid
    np.testing.assert_allclose(hybrid(*args, rate=0.0), drafter_losses.kl(*args))
    np.testing.assert_allclose(
        hybrid(*args, rate=1e3), drafter_losses.total_variation(*args)
    )
    weight = np.exp(-3 * 0.75)
    expected = weight * jax.grad(drafter_losses.kl, 1)(*args) + (1 - weight) * jax.grad(
        drafter_losses.total_variation, 1
    )(*args)
    np.testing.assert_allclose(jax.grad(hybrid, 1)(*args), expected, rtol=1e-5)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="token_loss='l2'.*soft_ce, kl, tv"):
        drafter_losses.token_loss("l2", TARGET, DRAFT)


def test_smooth_l1():
    features = jnp.array([[0.5, 3.0], [-0.5, -2.0]])
    target = jnp.zeros((2, 2))
    expected = [0.125, (2.5 + 1.5) / 2]
    np.testing.assert_allclose(drafter_losses.smooth_l1(target, features), expected)
