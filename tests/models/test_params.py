"""Everything about the weights follows from their description."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params

# Programs that run once: compiling them is what takes time.
init = jax.jit(
    model_params.init,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)
PLAIN = model_config.ModelConfig(
    family="llama",
    vocab_size=50,
    num_layers=3,
    d_model=40,
    d_ff=70,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
)
FULL = dataclasses.replace(
    PLAIN,
    tie_embeddings=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


@pytest.mark.parametrize("cfg", [PLAIN, FULL], ids=["plain", "full"])
def test_every_form_has_the_described_leaves(cfg):
    described = model_params.describe(cfg)
    params = jax.eval_shape(
        lambda key: model_params.init(cfg, key, jnp.bfloat16), jax.random.key(0)
    )
    abstract = model_params.abstract(cfg, jnp.bfloat16)
    axes = model_params.logical_axes(cfg)

    def check(weight, leaf, shape, names):
        assert leaf.shape == shape.shape == weight.shape
        assert leaf.dtype == shape.dtype == jnp.bfloat16
        assert len(names) == len(weight.shape)

    # Fails, too, where one form has a leaf that another lacks.
    jax.tree.map(check, described, params, abstract, axes)
    assert model_params.count(cfg) == sum(x.size for x in jax.tree.leaves(params))


def test_the_head_is_the_embedding_or_its_own():
    tied, untied = model_params.describe(PLAIN), model_params.describe(FULL)
    assert tied.lm_head is None and tied.head is tied.embed
    assert untied.head is untied.lm_head
    untied_cfg = dataclasses.replace(PLAIN, tie_embeddings=False)
    extra = PLAIN.vocab_size * PLAIN.d_model
    assert model_params.count(untied_cfg) == model_params.count(PLAIN) + extra


def test_draws_depend_on_key_and_have_the_described_scale():
    params = init(FULL, jax.random.key(3))
    again = init(FULL, jax.random.key(3))
    other = init(FULL, jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    seen = []

    def check(weight, leaf, other_leaf):
        if weight.init != "normal":
            wanted = {"ones": 1.0, "zeros": 0.0}[weight.init]
            np.testing.assert_array_equal(leaf, np.full(weight.shape, wanted))
            return
        assert np.all(leaf != other_leaf)
        z = np.asarray(leaf) * np.sqrt(weight.fan_in)
        assert abs(z.mean()) < 4 / np.sqrt(z.size)
        assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
        seen.append(float(z.ravel()[0]))

    jax.tree.map(check, model_params.describe(FULL), params, other)
    assert len(set(seen)) == len(seen) == 6  # no two leaves share their draw


def test_fan_in_is_the_number_of_inputs_of_each_product():
    layers = model_params.describe(FULL).layers
    assert layers.qkv.fan_in == layers.gate_up.fan_in == FULL.d_model
    assert layers.out.fan_in == FULL.num_heads * FULL.head_dim
    assert layers.down.fan_in == FULL.d_ff


def test_unstacking_splits_every_leaf_by_layer():
    params = init(FULL, jax.random.key(0))
    split = model_params.unstack(params)
    assert isinstance(split.layers, tuple) and len(split.layers) == FULL.num_layers
    back = jax.tree.map(lambda *leaves: np.stack(leaves), *split.layers)
    jax.tree.map(np.testing.assert_array_equal, back, params.layers)
    assert model_params.unstack(split) is split
    assert split.embed is params.embed and split.lm_head is params.lm_head
