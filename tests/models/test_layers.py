"""The stated gradient of a product, and logits of many columns against few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import layers, transformer
from tlt_jax.models import params as model_params


@pytest.mark.parametrize("out", [(7,), (2, 3), (2, 3, 4)])
def test_gradient_of_a_product_is_the_derived_one(out):
    keys = jax.random.split(jax.random.key(0), 3)
    weight = jax.random.normal(keys[0], (*out, 5))
    x = jax.random.normal(keys[1], (5, 2, 6))
    scale = jax.random.normal(keys[2], (*out, 2, 6))

    def total(product):
        return lambda weight, x: jnp.sum(product(weight, x) ** 2 * scale)

    def plain(weight, x):
        return jnp.tensordot(weight, x, axes=1)

    np.testing.assert_allclose(
        layers.product(weight, x), plain(weight, x), rtol=1e-6, atol=1e-6
    )
    got = jax.jit(jax.grad(total(layers.product), (0, 1)))(weight, x)
    expected = jax.grad(total(plain), (0, 1))(weight, x)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_logits_of_many_columns_are_those_of_few():
    keys = jax.random.split(jax.random.key(1), 2)
    head = jax.random.normal(keys[0], (11, 5))
    params = model_params.Params(embed=head, layers=(), final_norm=jnp.ones(5))
    hidden = jax.random.normal(keys[1], (5, 3, 64))
    whole = transformer.logits(params, hidden)
    assert whole.shape == (3, 64, 11)
    few = jnp.stack([transformer.logits(params, hidden[:, i]) for i in range(3)])
    np.testing.assert_allclose(whole, few, rtol=1e-5, atol=1e-5)
    exact = np.einsum("vd,dbt->btv", np.float64(head), np.float64(hidden))
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-5)
