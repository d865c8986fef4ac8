"""Products and their stated gradient, logits of many columns, rotary frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import config as model_config
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


def test_rotation_turns_the_halves_against_each_other():
    x = jnp.array([1.0, 2.0]).reshape(2, 1, 1)
    cos, sin = jnp.full((1, 1, 1), 0.6), jnp.full((1, 1, 1), 0.8)
    np.testing.assert_allclose(layers.rotate(x, cos, sin).ravel(), [-1, 2], rtol=1e-6)


def test_llama3_divides_what_turns_seldom_and_keeps_what_turns_often():
    scaling = model_config.RopeScaling("llama3", 4.0, 100)
    # In the original context: below the low bound, in the middle, above the high one.
    turns = np.array([0.5, 2.5, 8.0])
    freqs = turns * 2 * np.pi / 100
    stretched = layers.llama3_frequencies(freqs, scaling)
    np.testing.assert_allclose(stretched / freqs, [0.25, 0.625, 1.0], rtol=1e-12)


@pytest.mark.parametrize("given,expected", [(None, 1.1386294), (1.5, 1.5)])
def test_yarn_scales_cosine_and_sine(given, expected):
    scaling = model_config.RopeScaling("yarn", 4.0, 16, attention_factor=given)
    sizes = dict(vocab_size=5, num_layers=1, d_model=8, d_ff=8, head_dim=8)
    heads = dict(num_heads=1, num_kv_heads=1, tie_embeddings=True)
    cfg = model_config.ModelConfig("llama", **sizes, **heads, rope_scaling=scaling)
    cos, sin = layers.rope_tables(cfg, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, expected, rtol=1e-6)
    assert not sin.any()


def test_columns_of_bfloat16_do_not_hang_on_how_many_there_are():
    """On CPUs; a verified column then has the bits of a plain step's."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(1536, 576)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(576, 1, 64)), jnp.bfloat16)
    product = jax.jit(layers.product)
    whole = np.asarray(product(weight, x), np.float32)
    for count in (2, 16, 40):
        few = np.asarray(product(weight, x[..., :count]), np.float32)
        np.testing.assert_array_equal(few, whole[..., :count])
