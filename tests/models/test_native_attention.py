"""The native kernel takes a layer's attention where it may, and does not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cpu_kernels import hosts
from tlt_jax.cpu_kernels import attention as cpu_attention
from tlt_jax.models import attention, kernel_attention, kernels, kv_cache, layers
from tlt_jax.models import config as model_config

NATIVE = kernels.Kernels(products="native", native_attention=True)
CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=8,
    num_layers=2,
    d_model=64,
    d_ff=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
)
BATCH, TOKENS, PAGE = 2, 3, 16


def test_what_the_kernel_does_not_compute_is_left_to_the_portable_walk():
    x = jax.ShapeDtypeStruct((64, BATCH, TOKENS), jnp.float32)
    cache = jax.eval_shape(lambda: kv_cache.create(CFG, 4, PAGE, jnp.float32))
    rows = jnp.zeros((BATCH, 2), jnp.int32), jnp.zeros(BATCH, jnp.int32)
    segment = jnp.zeros((BATCH, TOKENS), jnp.int32)
    right = dict(
        kernels=NATIVE,
        x_DBT=x,
        head_dim=16,
        view=kv_cache.CacheView(cache, *rows),
        visibility=attention.Visibility(),
    )
    assert kernel_attention.takes_native(**right)
    for change in (
        dict(kernels=kernels.Kernels(products="native")),
        dict(kernels=kernels.Kernels(native_attention=True)),
        dict(view=None),
        dict(window=5),
        dict(visibility=attention.Visibility(segment=segment, prefix=segment)),
        dict(x_DBT=jax.ShapeDtypeStruct((64, 300, 1), jnp.float32)),
        dict(head_dim=6),
    ):
        assert not kernel_attention.takes_native(**right | change), change


@hosts.needs_native
@pytest.mark.parametrize("num_past", [0, 4])
def test_it_attends_as_the_portable_parts_joined(num_past):
    cpu_attention.register()
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    lengths = jnp.array([19, 0])
    table = jnp.array([[3, 1], [0, 0]])
    pages = normal(2, 4, 2, 16, PAGE)
    cache = kv_cache.PagedCache(pages, normal(*pages.shape))
    view = kv_cache.CacheView(cache, table, lengths)
    ancestors = jnp.tile(jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]]) == 1, (2, 1, 1))
    qkv = normal(2, 4, 16, BATCH, TOKENS)
    rope = layers.rope_tables(CFG, lengths[:, None] + jnp.array([0, 1, 1]))
    earlier = normal(2, 2, 16, BATCH, num_past)
    seen = jnp.asarray(rng.random((BATCH, TOKENS, num_past)) < 0.5)
    heads, keys, values = jax.jit(kernel_attention.attend_native)(
        qkv,
        *rope,
        view=view,
        layer=1,
        visibility=attention.Visibility(ancestors=ancestors),
        past=(*earlier, seen) if num_past else None,
    )

    query = layers.rotate(qkv[:, :2], *rope).transpose(3, 0, 1, 4, 2)
    wanted_keys = layers.rotate(qkv[:, 2], *rope)
    np.testing.assert_allclose(keys, wanted_keys, atol=1e-6)
    np.testing.assert_array_equal(values, qkv[:, 3])
    of_rows = [x.transpose(2, 0, 1, 3) for x in (wanted_keys, values)]
    part = attention.attend_masked(query, *of_rows, ancestors, scale=0.25)
    cached = attention.attend_cached(
        query.reshape(BATCH, 2, -1, 16), view, 1, scale=0.25
    )
    part = attention.join(part, cached)
    if num_past:
        old = [x.transpose(2, 0, 1, 3) for x in earlier]
        old = attention.attend_masked(query, *old, seen, scale=0.25)
        part = attention.join(part, old)
    wanted = attention.finish(part).reshape(BATCH, 2, 2, TOKENS, 16)
    np.testing.assert_allclose(heads, wanted.transpose(1, 2, 4, 0, 3), atol=2e-6)
