"""A weight times one column, with what stands around it, against its parts in turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import config as model_config
from tlt_jax.models import kernels, kv_cache, layers, transformer
from tlt_jax.models import params as model_params
from tlt_jax.pallas_kernels.one_column import api

INTERPRETED = api.IMPLEMENTATIONS[1]


def draw(*shape, seed=0, dtype=jnp.float32):
    made = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(made, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 1536])
def test_a_product_with_all_around_it(size, dtype):
    weight = draw(4, 8, size, dtype=dtype) / size**0.5
    x, scale = draw(size, 1, 1, dtype=dtype), 1 + draw(size)
    bias, residual = draw(4, 8, dtype=dtype), draw(4, 8, 1, 1, dtype=dtype)
    around = dict(norm=(scale, 1e-5), bias=bias, residual=residual)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (weight, x))
    for names in ((), ("norm", "residual"), tuple(around)):
        given = {name: around[name] for name in names}
        made = api.product(weight, x, implementation=INTERPRETED, **given)
        column = exact[1][:, 0, 0]
        if "norm" in names:
            column = column / np.sqrt(np.mean(column**2) + 1e-5) * np.asarray(scale)
        wanted = exact[0] @ column
        wanted = wanted + (np.asarray(bias, np.float64) if "bias" in names else 0)
        if "residual" in names:
            wanted = wanted + np.asarray(residual, np.float64)[..., 0, 0]
        assert made.shape == (4, 8, 1, 1) and made.dtype == dtype
        tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            np.asarray(made, np.float64)[..., 0, 0], wanted, atol=tolerance
        )


def test_the_first_half_gates_the_second():
    weight, x, bias = draw(2, 16, 64), draw(64, 1, 1), draw(2, 16)
    made = api.product(weight, x, bias=bias, gated=True, implementation=INTERPRETED)
    first, second = np.asarray(weight) @ np.asarray(x)[:, 0, 0] + np.asarray(bias)
    wanted = first / (1 + np.exp(-first)) * second
    assert made.shape == (16, 1, 1)
    np.testing.assert_allclose(made[:, 0, 0], wanted, rtol=2e-5, atol=1e-5)


def test_what_it_takes():
    column, weight = jnp.zeros((192, 1, 1)), jnp.zeros((2, 8, 192))
    assert api.takes(weight, column)
    assert not api.takes(weight, jnp.zeros((192, 1, 2)))
    assert not api.takes(jnp.zeros((8, 192)), column)
    assert not api.takes(jnp.zeros((16, 96)), jnp.zeros((96, 1, 1)))
    with pytest.raises(ValueError, match="'cuda' is not known: use one of triton_gpu,"):
        api.product(weight, column, implementation="cuda")


def test_a_layer_of_one_column_is_that_of_many_programs():
    """By the forward that decodes, over a cache; the other columns are not taken."""
    cfg = model_config.ModelConfig(
        "qwen2", 32, 2, 64, 128, 4, 2, 16, False, qkv_bias=True
    )
    params = model_params.unstack(model_params.init(cfg, jax.random.key(0)))
    cache = kv_cache.create(cfg, 3, 16, jnp.float32)
    cache = dataclasses.replace(
        cache, keys=draw(*cache.keys.shape), values=draw(*cache.values.shape, seed=1)
    )
    view = kv_cache.CacheView(cache, jnp.array([[1, 2]]), jnp.array([20]))

    @jax.jit
    def both(tokens):
        positions = 20 + jnp.arange(tokens.shape[1])[None]
        return [
            transformer.forward(
                params, cfg, tokens, positions, view=view, kernels=chosen
            ).hidden
            for chosen in (kernels.PORTABLE, kernels.Kernels(one_column=INTERPRETED))
        ]

    for tokens in ([[3]], [[3, 4]]):
        plain, fused = both(jnp.array(tokens))
        np.testing.assert_allclose(fused, plain, atol=1e-5)
        assert (len(tokens[0]) == 1) == bool((fused != plain).any())


def test_layers_take_it_where_they_may():
    norm, weight = (jnp.ones(64), 1e-6), draw(16, 64)
    chosen = kernels.Kernels(one_column=INTERPRETED)

    def multiply(x, residual, kind=chosen):
        return layers.product(weight, x, kind, norm=norm, residual=residual)

    for columns in (1, 2):
        given = draw(64, 1, columns), draw(16, 1, columns)
        text = str(jax.make_jaxpr(multiply)(*given))
        assert ("one_column_product" in text) == (columns == 1)
        made = multiply(*given), multiply(*given, kernels.PORTABLE)
        np.testing.assert_allclose(*made, atol=1e-5)
