"""The drafter's forward: one law for cache filling, extension and tree levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import tiny_drafter
from tlt_jax.models import attention, kv_cache, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head

CFG = tiny_drafter.drafter_config()
FORWARD = jax.jit(functools.partial(drafter.forward), static_argnums=1)
EYE = functools.partial(jnp.eye, dtype=bool)


def inputs(num_tokens, batch=2):
    shape = (CFG.layer.d_model, batch, num_tokens)
    keys = jax.random.split(jax.random.key(5))
    positions = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
    return *(jax.random.normal(key, shape) for key in keys), positions


def test_extension_over_cache_and_earlier_keys_is_the_forward_in_one():
    params = tiny_drafter.params_of(CFG)
    embedded, features, positions = inputs(8)
    whole = FORWARD(params, CFG, embedded, features, positions)

    def part(start, stop, **options):
        here = slice(start, stop)
        return FORWARD(
            params,
            CFG,
            embedded[..., here],
            features[..., here],
            positions[:, here],
            **options,
        )

    first = part(0, 5)
    table, zeros = jnp.array([[1, 2], [4, 3]]), jnp.zeros(2, jnp.int32)
    cache = kv_cache.append(
        kv_cache.create(CFG.layer, 5, 4, jnp.float32),
        (first.keys,),
        (first.values,),
        table,
        zeros,
        zeros + 5,
    )
    view = kv_cache.CacheView(cache, table, zeros + 5)
    middle = part(5, 6, view=view)
    past = drafter.Past(middle.keys, middle.values, jnp.ones((2, 2, 1), bool))
    last = part(6, 8, view=view, past=past)
    joined = jnp.concatenate([first.hidden, middle.hidden, last.hidden], axis=-1)
    np.testing.assert_allclose(joined, whole.hidden, atol=1e-5)
    np.testing.assert_allclose(last.keys, whole.keys[..., 6:], atol=1e-5)


def test_nodes_of_a_level_see_their_own_ancestors_alone():
    params = tiny_drafter.params_of(CFG)
    embedded, features, _ = inputs(3, batch=1)
    earlier = jax.random.normal(jax.random.key(6), (2, *earlier_shape(), 4))
    # Of four earlier nodes each of three sees another set.
    mask = jnp.array([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]], bool)
    positions = jnp.full((1, 3), 7)

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(node):
        def chosen(embedded, keys):
            past = drafter.Past(keys, earlier[1], mask)
            level = attention.Visibility(ancestors=EYE(3)[None])
            output = drafter.forward(
                params,
                CFG,
                embedded,
                features,
                positions,
                visibility=level,
                past=past,
            )
            return jnp.sum(output.hidden[..., node] ** 3)

        of_inputs, of_keys = jax.grad(chosen, (0, 1))(embedded, earlier[0])
        return jnp.abs(of_inputs).sum((0, 1)), jnp.abs(of_keys).sum((0, 1, 2))

    for node in (1, 2):
        of_inputs, of_keys = slopes(node)
        np.testing.assert_array_equal(of_inputs > 0, np.arange(3) == node)
        np.testing.assert_array_equal(of_keys > 0, mask[0, node])


def earlier_shape():
    return CFG.layer.num_kv_heads, CFG.layer.head_dim, 1


def test_logits_are_rows_of_the_targets_head():
    target, hidden = tiny_drafter.target_params(), inputs(3)[0]
    whole = transformer.logits(target, hidden)
    params = tiny_drafter.params_of(CFG)
    head = drafter_head.head_rows(target, tiny_drafter.DRAFT_IDS)
    some = drafter_head.logits(params, CFG, head, hidden)
    np.testing.assert_allclose(some, whole[..., tiny_drafter.DRAFT_IDS], atol=1e-6)


def test_fused_feature_knows_no_scale_of_its_parts():
    params = tiny_drafter.params_of(CFG)
    parts = jax.random.normal(jax.random.key(2), (3, 16, 1, 2))
    scaled = parts * jnp.array([1.0, 100.0, 0.1])[:, None, None, None]
    fused = [drafter.fuse(params, CFG, x.reshape(48, 1, 2)) for x in (parts, scaled)]
    np.testing.assert_allclose(*fused, rtol=1e-3, atol=1e-3)
    plain = tiny_drafter.drafter_config(feature_layers=())
    last = parts[0]
    assert drafter.fuse(tiny_drafter.params_of(plain), plain, last) is last


def test_layers_that_are_fused():
    assert drafter.low_mid_high(30) == (2, 15, 27)
    with pytest.raises(ValueError, match="num_layers=6 has no layers"):
        drafter.low_mid_high(6)


def test_bad_drafters_are_refused():
    with pytest.raises(ValueError, match=r"names layers \[4\]"):
        tiny_drafter.drafter_config(feature_layers=(0, 4))
    with pytest.raises(ValueError, match="draft_vocab_size=25 is outside"):
        tiny_drafter.drafter_config(draft_vocab_size=25)
    with pytest.raises(ValueError, match="max_length=-1 is negative"):
        tiny_drafter.drafter_config(max_length=-1)
    with pytest.raises(ValueError, match="num_layers=4.*one layer"):
        drafter.DrafterConfig(layer=tiny_drafter.TARGET, target="")


def test_layer_of_a_windowed_target_has_no_window():
    target = model_config.ModelConfig(
        **vars(tiny_drafter.TARGET)
        | {"sliding_window": 4, "windowed_layers": (True,) * 4}
    )
    assert drafter.of_target(target).layer.window(0) is None
