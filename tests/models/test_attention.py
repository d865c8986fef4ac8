"""Attention over pages and fresh columns against a dense twin, key by key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import attention, kv_cache
from tlt_jax.rl.update import packing

B, K, G, T, H, MAX_PAGES, NUM_PAGES = 4, 2, 3, 4, 6, 4, 14
SCALE = 0.7
# For programs that run once: compiling them is what takes time.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
LAYER = 1
# Depths of a tree of fresh tokens: 0 -> 1, 0 -> 2, 2 -> 3.
DEPTHS = np.array([0, 1, 1, 2])
ANCESTORS = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def attend_twin(query, keys, values, visible):
    """One query head `[H]` over keys `[S, H]` of which it sees some; zeros if none."""
    if not visible.any():
        return np.zeros_like(query)
    weights = softmax(keys[visible] @ query * SCALE)
    return weights @ values[visible]


def case(page_size, lengths, seed=0):
    """Random inputs; NaN in every slot that no row may read.

    Rows 2 and 3 share their first page; pages are in no order.
    """
    rng = np.random.default_rng(seed)
    table = rng.permutation(np.arange(1, NUM_PAGES))[: B * 3].reshape(B, 3)
    table = np.concatenate([table, np.zeros((B, MAX_PAGES - 3), int)], axis=1)
    if min(lengths[2], lengths[3]) >= page_size:
        table[3, 0] = table[2, 0]
    cache = np.full((2, 2, NUM_PAGES, K, H, page_size), np.nan, np.float32)
    past = np.zeros((2, B, MAX_PAGES * page_size, K, H), np.float32)
    for row in range(B):
        for position in range(lengths[row]):
            page, slot = table[row, position // page_size], position % page_size
            column = cache[:, LAYER, page, :, :, slot]
            if np.isnan(column).any():
                column[:] = rng.normal(size=(2, K, H))
            past[:, row, position] = column
        # Entries without a page point at the scratch page.
        table[row, -(-lengths[row] // page_size) :] = kv_cache.SCRATCH_PAGE
    return dict(
        query=rng.normal(size=(B, K, G, T, H)).astype(np.float32),
        cache=kv_cache.PagedCache(*map(jnp.asarray, cache)),
        table=table.astype(np.int32),
        lengths=np.array(lengths, np.int32),
        keys=rng.normal(size=(B, K, H, T)).astype(np.float32),
        values=rng.normal(size=(B, K, H, T)).astype(np.float32),
        past=past,
    )


@functools.partial(jax.jit, static_argnames=("window", "block"))
def attend(query, cache, table, lengths, keys, values, mask, depths, window, block):
    """Join both parts, `[B, K, G, T, H]`."""
    batch, num_tokens = query.shape[0], query.shape[3]
    positions = lengths[:, None] + depths
    cached = attention.attend_cached(
        query.reshape(batch, K, -1, H),
        kv_cache.CacheView(cache, table, lengths),
        LAYER,
        scale=SCALE,
        positions=jnp.tile(positions, (1, G)),
        window=window,
    )
    fresh = attention.attend_fresh(
        query,
        keys,
        values,
        attention.Visibility(ancestors=mask),
        scale=SCALE,
        positions=positions,
        window=window,
        block=block,
    )
    whole = attention.finish(attention.join(cached, fresh))
    return whole.reshape(batch, K, G, num_tokens, H)


def run(inputs, *, window=None, block=256, **changes):
    inputs = {k: v for k, v in inputs.items() if k != "past"} | changes
    mask = np.broadcast_to(ANCESTORS, (B, T, T))
    return np.asarray(
        attend(**inputs, mask=mask, depths=DEPTHS, window=window, block=block)
    )


def expected(inputs, window):
    out = np.zeros((B, K, G, T, H))
    for b, k, g, t in np.ndindex(B, K, G, T):
        num_cached = inputs["lengths"][b]
        keys = np.concatenate(
            [inputs["past"][0, b, :num_cached, k], inputs["keys"][b, k].T]
        )
        values = np.concatenate(
            [inputs["past"][1, b, :num_cached, k], inputs["values"][b, k].T]
        )
        at = np.concatenate([np.arange(num_cached), num_cached + DEPTHS])
        visible = np.concatenate([np.ones(num_cached, bool), ANCESTORS[t]])
        if window is not None:
            visible = visible & (num_cached + DEPTHS[t] - at < window)
        query = inputs["query"][b, k, g, t].astype(np.float64)
        out[b, k, g, t] = attend_twin(query, keys, values, visible)
    return out


@pytest.mark.parametrize("page_size,lengths", [(1, (0, 3, 1, 2)), (4, (0, 1, 12, 7))])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_equals_the_dense_form(page_size, lengths, window):
    inputs = case(page_size, lengths)
    out = run(inputs, window=window)
    np.testing.assert_allclose(out, expected(inputs, window), atol=2e-6)
    if page_size > 1:  # blocks of queries, the last one smaller
        blocked = run(inputs, window=window, block=3)
        np.testing.assert_allclose(blocked, out, atol=1e-6)


def test_all_rows_may_be_empty():
    inputs = case(4, (0, 0, 0, 0))
    np.testing.assert_allclose(run(inputs), expected(inputs, None), atol=2e-6)


def test_rows_do_not_interact():
    inputs = case(4, (5, 1, 8, 9))
    out = run(inputs)
    # The same rows in other places, with their pages elsewhere.
    order = np.array([2, 0, 3, 1])
    pages = np.concatenate([[0], 1 + np.random.default_rng(1).permutation(13)])
    moved = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan).at[:, pages].set(leaf),
        inputs["cache"],
    )
    rows = {k: inputs[k][order] for k in ("query", "lengths", "keys", "values")}
    permuted = run(inputs, cache=moved, table=pages[inputs["table"]][order], **rows)
    np.testing.assert_array_equal(permuted, out[order])
    # Whatever the others hold, and however long they are.
    for row in range(B):
        others = np.arange(B) != row
        changed = {k: inputs[k].copy() for k in ("query", "keys", "values")}
        for values in changed.values():
            values[others] = np.nan
        for length in (0, 3, 12):
            lengths = np.where(others, length, inputs["lengths"])
            again = run(inputs, lengths=lengths, **changed)
            np.testing.assert_array_equal(again[row], out[row])
            assert np.isnan(again[others]).any(axis=(1, 2, 3, 4)).all()


def test_what_lies_behind_a_rows_length_changes_nothing():
    inputs = case(4, (5, 1, 8, 9))
    out = run(inputs)
    table = inputs["table"].copy()
    table[0, 2:] = table[3, :2]
    table[1, 1:] = 11
    for garbage in (0.0, np.inf, -3e38):
        cache = jax.tree.map(
            lambda leaf, g=garbage: jnp.where(jnp.isnan(leaf), g, leaf), inputs["cache"]
        )
        again = run(inputs, cache=cache, table=table)
        np.testing.assert_array_equal(again, out)


def test_pages_may_be_stored_in_less_precision():
    inputs = case(4, (5, 1, 8, 9))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs["cache"])
    back = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    np.testing.assert_array_equal(run(inputs, cache=rounded), run(inputs, cache=back))


def random_part(rng, shape, hidden=False):
    if hidden:
        return attention.Partial(
            jnp.zeros((*shape, H)), jnp.full(shape, -1e30), jnp.zeros(shape)
        )
    return attention.Partial(
        jnp.asarray(rng.normal(size=(*shape, H)), jnp.float32),
        jnp.asarray(rng.normal(size=shape) * 20, jnp.float32),
        jnp.asarray(1 + rng.random(shape), jnp.float32),
    )


def test_join_is_associative_and_an_empty_part_is_neutral():
    rng = np.random.default_rng(0)
    shape = (2, 3, 5)
    a, b, c = (random_part(rng, shape) for _ in range(3))
    join = quick_jit(attention.join)
    for left, right in (
        (join(join(a, b), c), join(a, join(b, c))),
        (join(a, b), join(b, a)),
    ):
        np.testing.assert_allclose(
            attention.finish(left), attention.finish(right), rtol=1e-5, atol=1e-6
        )
    none = random_part(rng, shape, hidden=True)
    for joined in (join(a, none), join(none, a)):
        jax.tree.map(np.testing.assert_array_equal, joined, a)
    assert not np.any(attention.finish(join(none, none)))


def layouts():
    """Rows with prompts, responses, several groups and padding."""
    rng = np.random.default_rng(0)

    def tokens(length):
        return rng.integers(1, 50, length).astype(np.int32)

    groups = [
        packing.Group(tokens(3), (tokens(2), tokens(1), tokens(2))),
        packing.Group(tokens(1), (tokens(3),)),
        packing.Group(tokens(2), (tokens(1), tokens(3))),
    ]
    return packing.pack(groups, row_tokens=12, rounding=1)


def test_visibility_is_that_of_packed_rows():
    packed = layouts()
    rule = packing.visible(packed)
    batch, num_tokens = packed.tokens.shape
    assert (packed.segment < 0).any() and batch > 1
    segments = attention.Visibility(
        segment=jnp.asarray(packed.segment), prefix=jnp.asarray(packed.prefix)
    )
    ancestors = attention.Visibility(ancestors=jnp.asarray(rule))
    causal = np.tril(np.ones((1, num_tokens, num_tokens), bool))
    for visibility, mask in (
        (segments, rule),
        (ancestors, rule),
        (attention.Visibility(), causal),
    ):
        for start, stop in ((0, num_tokens), (0, 1), (5, 9), (9, num_tokens)):
            block = visibility.block(start, stop)
            np.testing.assert_array_equal(block, mask[:, start:stop, :stop])
            assert not mask[:, start:stop, stop:].any()


@pytest.mark.parametrize("block", [256, 5])
def test_invisible_keys_have_no_gradient_and_visible_ones_do(block):
    packed = layouts()
    rule = packing.visible(packed)
    batch, num_tokens = packed.tokens.shape
    rng = np.random.default_rng(0)
    query = rng.normal(size=(batch, 1, 2, num_tokens, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, batch, 1, H, num_tokens)).astype(np.float32)
    direction = rng.normal(size=(1, 2 * num_tokens, H)).astype(np.float32)

    def outputs(keys, values, segment):
        part = attention.attend_fresh(
            query,
            keys,
            values,
            attention.Visibility(segment=segment, prefix=jnp.asarray(packed.prefix)),
            scale=SCALE,
            block=block,
        )
        each = jnp.sum(attention.finish(part) * direction, axis=(1, 3))
        return jnp.sum(each.reshape(batch, 2, num_tokens), axis=1)

    jacobian = quick_jit(jax.jacrev(outputs, argnums=(0, 1)))
    slopes = jacobian(keys, values, jnp.asarray(packed.segment))
    # A query that sees one key only gives it all the weight, whatever its score.
    alone = rule.sum(-1, keepdims=True) == 1
    for slope, exempt in zip(slopes, (alone, False), strict=True):
        size = np.abs(slope).max(axis=(3, 4))  # [B, T, B, S]
        for b, other in np.ndindex(batch, batch):
            seen = rule[b] if b == other else np.zeros_like(rule[b])
            assert np.all(size[b, :, other][~seen] == 0)
            wanted = seen & ~exempt[b] if exempt is not False else seen
            assert np.all(size[b, :, other][wanted] > 0)


def test_a_query_that_sees_nothing_yields_zeros_and_finite_gradients():
    segment = jnp.full((1, 3), -1)

    def total(x):
        visibility = attention.Visibility(segment=segment, prefix=segment)
        part = attention.attend_fresh(
            x, x[:, :, 0].swapaxes(2, 3), x[:, :, 0].swapaxes(2, 3), visibility, scale=1
        )
        out = attention.finish(part)
        return jnp.sum(out**2 + out), out

    slope, out = quick_jit(jax.grad(total, has_aux=True))(jnp.ones((1, 1, 1, 3, H)))
    assert not np.any(out)
    assert not np.any(slope)


def long_case(seed=0):
    """A row of 45 columns with several groups and padding, and one of padding alone."""
    rng = np.random.default_rng(seed)

    def tokens(length):
        return rng.integers(1, 50, length).astype(np.int32)

    groups = [
        packing.Group(tokens(7), (tokens(9), tokens(4), tokens(6))),
        packing.Group(tokens(3), (tokens(8), tokens(5))),
    ]
    packed = packing.pack(groups, row_tokens=45, rounding=45, rows_multiple=2)
    assert packed.tokens.shape == (2, 45) and (packed.segment[1] < 0).all()
    query = rng.normal(size=(2, K, G, 45, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, K, H, 45)).astype(np.float32)
    return packed, query, keys, values


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("seen_by", ["segments", "ancestors", "all before"])
def test_long_rows_are_walked_in_tiles_to_the_same_end(seen_by, window):
    packed, *arrays = long_case()
    visibility = {
        "segments": attention.Visibility(
            segment=jnp.asarray(packed.segment), prefix=jnp.asarray(packed.prefix)
        ),
        "ancestors": attention.Visibility(
            ancestors=jnp.asarray(packing.visible(packed))
        ),
        "all before": attention.Visibility(),
    }[seen_by]
    weights = np.random.default_rng(1).normal(size=(2, K, G * 45, H))

    def run(block):
        def loss(query, keys, values, window):
            part = attention.attend_fresh(
                query,
                keys,
                values,
                visibility,
                scale=SCALE,
                positions=jnp.asarray(packed.positions),
                window=window,
                block=block,
            )
            # Joined with another part, as with what is cached.
            other = attention.Partial(
                total=jnp.full((2, K, G * 45, H), 0.3),
                maximum=jnp.full((2, K, G * 45), 0.2),
                normaliser=jnp.full((2, K, G * 45), 0.7),
            )
            out = attention.finish(part), attention.finish(attention.join(part, other))
            return sum(jnp.sum(x * weights) for x in out), (part, out)

        # As a layer does: computed again in the backward pass, and in a loop.
        slopes = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2), has_aux=True)
        return quick_jit(slopes)(*arrays, None if window is None else jnp.int32(window))

    slopes, (_, out) = run(block=256)
    for block in (1, 2, 5):  # 12, 6 and 3 tiles, the last one padded
        tiled_slopes, (_, tiled_out) = run(block)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5),
            (tiled_slopes, tiled_out),
            (slopes, out),
        )
    assert all(np.abs(slope).max() > 0.1 for slope in slopes)


def test_long_rows_give_programs_that_do_not_grow():
    def size(num_tokens):
        query = jax.ShapeDtypeStruct((1, K, G, num_tokens, H), jnp.float32)
        keys = jax.ShapeDtypeStruct((1, K, H, num_tokens), jnp.float32)

        def total(query, keys):
            part = attention.attend_fresh(
                query, keys, keys, attention.Visibility(), scale=SCALE, block=2
            )
            return jnp.sum(attention.finish(part))

        lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(query, keys)
        return lowered.as_text().count("\n")

    assert size(1024) == size(128)


def test_tiled_queries_that_see_nothing_yield_zeros_and_finite_gradients():
    segment = jnp.full((1, 9), -1)

    def total(x):
        visibility = attention.Visibility(segment=segment, prefix=segment)
        keys = x[:, :, 0].swapaxes(2, 3)
        part = attention.attend_fresh(x, keys, keys, visibility, scale=1, block=1)
        out = attention.finish(part)
        return jnp.sum(out**2 + out), out

    slope, out = quick_jit(jax.grad(total, has_aux=True))(jnp.ones((1, 1, 1, 9, H)))
    assert not np.any(out)
    assert not np.any(slope)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_key_weighs_the_same_in_whichever_part_it_stands(dtype):
    """Verified beside fresh keys, or read from the cache a step later."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(3 * rng.normal(size=(1, 2, 3, 24)), jnp.float32)
    values = jnp.asarray(rng.normal(size=(1, 2, 24, 8)), dtype)
    seen, spec = jnp.ones((1, 1, 1, 1), bool), "bkms,bksh->bkmh"

    def split(at):
        left = attention._part(scores[..., :at], seen, values[:, :, :at], spec)
        right = attention._part(scores[..., at:], seen, values[:, :, at:], spec)
        return attention.finish(attention.join(left, right))

    whole = attention.finish(attention._part(scores, seen, values, spec))
    # About its part's own maximum a weight of bfloat16 would be off by up to 2**-9.
    for at in (1, 8, 19, 23):
        np.testing.assert_allclose(split(at), whole, atol=2e-6, rtol=0)
