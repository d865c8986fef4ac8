"""Writes to the paged cache against loops over columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import config as model_config
from tlt_jax.models import kv_cache
from tlt_jax.pallas_kernels.verify_attention import page_layout
from tlt_jax.runtime import sharding

L, K, H, B, NUM_PAGES = 2, 2, 4, 3, 9
TABLE = np.array([[5, 2, 0], [1, 8, 3], [7, 4, 6]], np.int32)
SCRATCH = kv_cache.SCRATCH_PAGE


def some_cache(page_size, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, L, NUM_PAGES, K, H, page_size)
    return rng.normal(size=shape).astype(np.float32)


def some_columns(width, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, L, K, H, B, width)).astype(np.float32)


def as_cache(arrays):
    return kv_cache.PagedCache(*map(jnp.asarray, arrays))


def without_scratch(cache):
    stacked = np.stack([cache.keys, cache.values])
    return np.delete(stacked, SCRATCH, axis=2)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("form", ["stacked", "tuple", "bfloat16"])
def test_append_writes_the_first_columns_of_each_row(page_size, form):
    width = 2 if page_size == 1 else 5
    lengths = np.array([0, 1, 1] if page_size == 1 else [3, 4, 5], np.int32)
    before, columns = some_cache(page_size), some_columns(width)
    append = jax.jit(kv_cache.append, donate_argnums=0)
    for counts in ([1, 2, 0], [2, 0, 1], [0, 0, 0], [width - 1, width, width]):
        counts = np.minimum(counts, 3 * page_size - lengths).astype(np.int32)
        cache, fresh = as_cache(before), tuple(map(jnp.asarray, columns))
        wanted = before.copy()
        if form == "tuple":
            fresh = tuple(tuple(side) for side in fresh)
        if form == "bfloat16":
            cache = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cache)
            wanted = wanted.astype(jnp.bfloat16)
        for row in range(B):
            for t in range(counts[row]):
                position = lengths[row] + t
                page, slot = TABLE[row, position // page_size], position % page_size
                wanted[:, :, page, :, :, slot] = columns[:, :, :, :, row, t]
        after = append(cache, *fresh, TABLE, lengths, counts)
        assert after.keys.dtype == wanted.dtype
        np.testing.assert_array_equal(
            without_scratch(after), np.delete(wanted, SCRATCH, axis=2)
        )


@pytest.mark.parametrize("page_size,width", [(1, 2), (4, 1), (4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writing_as_on_accelerators_gives_the_same_cache(page_size, width, dtype):
    rng = np.random.default_rng(2)
    before, columns = some_cache(page_size), some_columns(8)
    # Columns that are not taken may hold anything.
    columns[..., 7] = np.nan
    straight, on_tpu, on_gpu = map(
        jax.jit,
        (
            kv_cache._append_columns,
            kv_cache._append_through_pages,
            kv_cache._append_by_scatter,
        ),
    )
    for _ in range(6):
        cache = jax.tree.map(lambda x: x.astype(dtype), as_cache(before))
        lengths = rng.integers(0, 3 * page_size - width + 1, B).astype(np.int32)
        counts = rng.integers(0, width + 1, B).astype(np.int32)
        # Any of all rows' columns but the last of each, wherever they stand.
        sources = 8 * rng.integers(0, B, (B, width)) + rng.integers(0, 7, (B, width))
        fresh = kv_cache._fresh(cache, *columns, None)
        new = kv_cache._Write(fresh, TABLE, lengths, counts, sources.astype(np.int32))
        given = (cache, new)
        wanted = straight(*given)
        for after in (on_tpu(*given), on_gpu(*given)):
            assert after.keys.dtype == dtype
            np.testing.assert_array_equal(
                without_scratch(after), without_scratch(wanted)
            )
    assert (without_scratch(wanted) != without_scratch(cache)).any()


@pytest.mark.parametrize(
    ("platform", "num_scatters", "num_loops"), [("cuda", 2, 0), ("cpu", 0, 1)]
)
def test_a_gpu_appends_without_a_loop(platform, num_scatters, num_loops):
    given = (as_cache(some_cache(4)), *map(jnp.asarray, some_columns(3)), TABLE)
    rows = np.zeros(B, np.int32), np.ones(B, np.int32)
    traced = jax.jit(kv_cache.append).trace(*given, *rows)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('"stablehlo.scatter"') == num_scatters
    assert text.count("stablehlo.while") == num_loops


@pytest.mark.parametrize(("platform", "num_loops"), [("tpu", 1), ("cuda", 0)])
def test_a_tpu_reads_features_through_pages(platform, num_loops):
    """Its compiler copies all pages before it gathers columns of them."""
    features = jnp.zeros((1, NUM_PAGES, 1, 6, 4))
    cache = as_cache(some_cache(4)).replace(features=features)
    read = jax.jit(kv_cache.read_features, static_argnums=3)
    traced = read.trace(cache, jnp.asarray(TABLE), np.zeros(B, np.int32), 3)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") == num_loops
    # Of the columns, beside that of which page is which row's.
    gathers = [line for line in text.splitlines() if "stablehlo.gather" in line]
    assert any("x6x4xf32" in line for line in gathers) == (not num_loops)


def packed(cache, packing):
    """The same columns, with room for more features, as TPUs hold small pages."""

    def one(pages):
        room = page_layout.padded(pages.shape[3], packing) - pages.shape[3]
        pages = jnp.pad(pages, [(0, 0)] * 3 + [(0, room), (0, 0)])
        return page_layout.pack(pages, packing)

    return kv_cache.PagedCache(
        one(cache.keys),
        one(cache.values),
        page_layout.pack(cache.features, packing),
        packing,
    )


def test_packed_pages_are_written_and_read_as_columns():
    page_size, width, packing = 4, 8, 2
    pages = as_cache(some_cache(page_size))
    features = jnp.asarray(some_columns(NUM_PAGES * page_size))[0, :1]
    cache = pages.replace(
        features=features.reshape(1, NUM_PAGES, 1, -1, page_size)[..., :6, :]
    )
    num_features = cache.features.shape[3]
    rng = np.random.default_rng(3)
    columns = some_columns(width)
    fresh = jnp.asarray(rng.normal(size=(num_features, B, width)), jnp.float32)
    lengths = np.array([4, 0, 4], np.int32)
    counts = np.array([3, 8, 7], np.int32)
    both = cache, packed(cache, packing)
    assert both[1].page_size == page_size and both[1].num_pages == NUM_PAGES
    for append in (kv_cache.append, kv_cache.append_pages):
        both = [
            jax.jit(append)(one, *columns, TABLE, lengths, counts, features=fresh)
            for one in both
        ]
        wanted = packed(both[0], packing)
        for name in ("keys", "values", "features"):
            got = getattr(both[1], name)
            np.testing.assert_array_equal(got[:, 1:], getattr(wanted, name)[:, 1:])
        lengths = np.array([8, 0, 4], np.int32)
    start = np.array([1, 3, 0], np.int32)
    read = [kv_cache.read_features(one, TABLE, start, 7) for one in both]
    np.testing.assert_array_equal(*read)
    read = [kv_cache.read_feature_pages(one, jnp.array([5, 2])) for one in both]
    np.testing.assert_array_equal(*read)


@pytest.mark.parametrize("packing", [1, 2])
def test_features_split_over_eight_devices_are_those_of_one(packing):
    mesh, num_features, page_size = sharding.make_mesh(1, 1, 8), 48, 4
    rng = np.random.default_rng(4)
    pages = rng.normal(size=(1, NUM_PAGES, 1, num_features, page_size))
    whole = as_cache(some_cache(page_size)).replace(features=jnp.float32(pages))
    whole = whole if packing == 1 else packed(whole, packing)
    where = jax.tree.map(
        lambda leaf, axes: sharding.named(
            mesh, sharding.ShardingRules(), axes, leaf.shape, replicate=True
        ),
        whole,
        kv_cache.logical_axes(whole),
    )
    split = jax.device_put(whole, where)
    assert split.features.addressable_shards[0].data.size * 8 == split.features.size
    fresh = jnp.float32(rng.normal(size=(num_features, B, 8)))
    lengths, counts = jnp.array([4, 0, 4]), jnp.array([3, 8, 7])

    def write_and_read(cache):
        given = *map(jnp.asarray, (*some_columns(8), TABLE)), lengths
        cache = kv_cache.append_pages(cache, *given, counts, features=fresh)
        cache = kv_cache.append(cache, *given, counts - 2, features=2 * fresh)
        read = kv_cache.read_features(
            cache, jnp.asarray(TABLE), jnp.maximum(lengths - 1, 0), 7
        )
        return cache, read, kv_cache.read_feature_pages(cache, jnp.array([5, 2]))

    one = jax.jit(write_and_read)(whole)
    several = jax.jit(write_and_read, out_shardings=(where, None, None))(split)
    for got, wanted in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_rows_that_drop_everything_need_no_pages():
    before, columns = some_cache(4), some_columns(3)
    after = kv_cache.append(
        as_cache(before),
        *map(jnp.asarray, columns),
        jnp.zeros((B, 1), jnp.int32),
        jnp.array([0, 99, 4]),
        jnp.zeros(B, jnp.int32),
    )
    np.testing.assert_array_equal(
        without_scratch(after), np.delete(before, SCRATCH, axis=2)
    )


@pytest.mark.parametrize("page_size,width", [(1, 2), (4, 4), (4, 8)])
def test_append_pages_writes_whole_pages(page_size, width):
    before, columns = some_cache(page_size), some_columns(width)
    lengths = np.array([0, page_size, 0], np.int32)
    append_pages = jax.jit(kv_cache.append_pages, donate_argnums=0)
    for counts in ([0, 1, width], [1, width, 0], [width - 1, 0, page_size]):
        wanted = before.copy()
        for row in range(B):
            for j in range(width // page_size):
                if j * page_size < counts[row]:
                    page = TABLE[row, lengths[row] // page_size + j]
                    piece = slice(j * page_size, (j + 1) * page_size)
                    wanted[:, :, page] = columns[:, :, :, :, row, piece]
        after = append_pages(
            as_cache(before),
            *map(jnp.asarray, columns),
            TABLE,
            lengths,
            np.array(counts, np.int32),
        )
        np.testing.assert_array_equal(
            without_scratch(after), np.delete(wanted, SCRATCH, axis=2)
        )


def test_append_pages_refuses_parts_of_pages():
    columns = map(jnp.asarray, some_columns(6))
    with pytest.raises(ValueError, match="6 columns a row.*page_size=4: use append"):
        kv_cache.append_pages(
            as_cache(some_cache(4)), *columns, TABLE, np.zeros(B, int), np.zeros(B, int)
        )


def test_copy_pages_copies_in_order_and_pads_with_zeros():
    before = some_cache(4)
    sources, targets = np.array([3, 5, 2, 0, 0]), np.array([1, 3, 8, 0, 0])
    wanted = before.copy()
    for source, target in zip(sources, targets, strict=True):
        wanted[:, :, target] = wanted[:, :, source]
    after = jax.jit(kv_cache.copy_pages)(as_cache(before), sources, targets)
    np.testing.assert_array_equal(np.stack([after.keys, after.values]), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cache_takes_the_bytes_that_it_says(dtype):
    cfg = model_config.ModelConfig(
        family="llama",
        vocab_size=8,
        num_layers=L,
        d_model=12,
        d_ff=8,
        num_heads=6,
        num_kv_heads=K,
        head_dim=H,
        tie_embeddings=True,
    )
    cache = kv_cache.create(cfg, NUM_PAGES, 4, dtype)
    assert (cache.num_pages, cache.page_size) == (NUM_PAGES, 4)
    assert cache.keys.shape == cache.values.shape == (L, NUM_PAGES, K, H, 4)
    total = cache.keys.nbytes + cache.values.nbytes
    assert total == NUM_PAGES * kv_cache.page_bytes(cfg, 4, dtype)
