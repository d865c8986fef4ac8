"""The one forward agrees with itself: in chunks, over a cache, packed, in any form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import attention, kv_cache, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.rl.update import packing

CFG = model_config.ModelConfig(
    family="qwen3",
    vocab_size=37,
    num_layers=3,
    d_model=16,
    d_ff=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
    sliding_window=5,
    windowed_layers=(False, True, False),
)
B, NUM_TOKENS, PAGE_SIZE = 3, 15, 4
# These programs run once or twice: compiling them is what takes time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FORMS = {"stacked": lambda params: params, "unstacked": model_params.unstack}


@pytest.fixture(scope="module")
def params():
    """Every leaf random, norms and biases too."""
    rng = np.random.default_rng(0)

    def draw(weight):
        noise = rng.normal(size=weight.shape)
        scale = {"normal": weight.fan_in**-0.5, "ones": 0.3, "zeros": 0.3}[weight.init]
        return jnp.asarray(scale * noise + (weight.init == "ones"), jnp.float32)

    return jax.tree.map(draw, model_params.describe(CFG))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, CFG.vocab_size, (B, NUM_TOKENS))


@functools.partial(jit, static_argnames="dtype")
def forward(params, tokens, positions, visibility, dtype=jnp.float32):
    """The whole rows at once: logits `[B, T, V]` and the output."""
    out = transformer.forward(
        params, CFG, tokens, positions, visibility, features=(0, 2, 1), dtype=dtype
    )
    return transformer.logits(params, out.hidden), out


def causal(params, tokens, **options):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segment = jnp.zeros(tokens.shape, jnp.int32)
    visibility = attention.Visibility(segment=segment, prefix=segment)
    return forward(params, tokens, positions, visibility, **options)


@functools.partial(jit, donate_argnames="cache")
def feed(params, cache, table, lengths, tokens, counts):
    """Feed `tokens [B, T]`, of which each row keeps the first `counts`."""
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])
    view = kv_cache.CacheView(cache, table, lengths)
    out = transformer.forward(params, CFG, tokens, positions, None, view)
    cache = kv_cache.append(cache, out.keys, out.values, table, lengths, counts)
    return transformer.logits(params, out.hidden), cache


@pytest.mark.parametrize("form", FORMS)
def test_chunks_over_a_cache_equal_the_whole(params, tokens, form):
    params = FORMS[form](params)
    whole, out = causal(params, tokens)
    table = 1 + np.random.default_rng(2).permutation(12).reshape(3, 4).astype(np.int32)
    # Whatever is in the pages before they are written is not read.
    cache = jax.tree.map(
        lambda pages: jnp.full_like(pages, jnp.nan),
        kv_cache.create(CFG, 13, PAGE_SIZE, jnp.float32),
    )
    lengths = np.zeros(B, np.int32)
    # Chunks of which rows keep different parts, then one token at a time.
    kept = [(4, [4, 3, 0]), (4, [4, 1, 4]), (4, [1, 4, 2])] + [(1, [1, 1, 1])] * 6
    logits = np.zeros_like(whole)
    for width, counts in kept:
        at = np.minimum(lengths[:, None] + np.arange(width), NUM_TOKENS - 1)
        rows = np.arange(B)[:, None]
        ours, cache = feed(
            params, cache, table, lengths, tokens[rows, at], np.array(counts)
        )
        for row, count in enumerate(counts):
            logits[row, lengths[row] : lengths[row] + count] = ours[row, :count]
        lengths = lengths + np.array(counts, np.int32)
    assert lengths[0] == lengths.max() == NUM_TOKENS and lengths.min() < NUM_TOKENS
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length], whole[row, :length], rtol=0, atol=1e-5
        )
        for pages, columns in ((cache.keys, out.keys), (cache.values, out.values)):
            pages = np.asarray(pages)[:, table[row]]
            cached = np.moveaxis(pages, 1, -2).reshape(*pages.shape[:1], 2, 6, -1)
            columns = np.stack(columns)[:, :, :, row, :length]
            np.testing.assert_allclose(cached[..., :length], columns, atol=1e-5)


def test_scanned_and_unrolled_layers_agree(params, tokens):
    logits, out = causal(params, tokens)
    their_logits, theirs = causal(model_params.unstack(params), tokens)
    np.testing.assert_allclose(logits, their_logits, atol=1e-5)
    np.testing.assert_allclose(out.hidden, theirs.hidden, atol=1e-5)
    assert len(out.features) == len(theirs.features) == 3
    for ours, other in zip(out.features, theirs.features, strict=True):
        assert ours.shape == (CFG.d_model, B, NUM_TOKENS)
        np.testing.assert_allclose(ours, other, atol=1e-5)
    assert isinstance(theirs.keys, tuple) and len(theirs.values) == 3
    for ours, other in ((out.keys, theirs.keys), (out.values, theirs.values)):
        np.testing.assert_allclose(ours, np.stack(other), atol=1e-5)
    # In the order asked for: features 0, 2, 1; the last becomes the hidden state.
    normed = np.asarray(theirs.features[1])
    normed = normed / np.sqrt((normed**2).mean(0) + CFG.rms_norm_eps)
    scaled = normed * np.asarray(params.final_norm)[:, None, None]
    np.testing.assert_allclose(scaled, out.hidden, atol=1e-5)
    assert np.abs(out.features[0] - out.features[2]).max() > 0.1


def test_columns_may_be_left_out(params, tokens):
    positions = np.broadcast_to(np.arange(NUM_TOKENS), tokens.shape)
    for given in (params, model_params.unstack(params)):
        out = jax.eval_shape(
            lambda params: transformer.forward(
                params, CFG, tokens, positions, with_cache_columns=False
            ),
            given,
        )
        leaves = jax.tree.leaves((out.keys, out.values))
        assert not leaves and out.features == ()


def packed_rows():
    """Rows of unlike groups in which no token id appears twice."""
    ids = iter(range(CFG.vocab_size))

    def take(length):
        return np.array([next(ids) for _ in range(length)], np.int32)

    groups = [
        packing.Group(take(3), (take(4), take(2))),
        packing.Group(take(2), (take(2),)),
        packing.Group(take(2), (take(1), take(3))),
    ]
    return packing.pack(
        groups, row_tokens=NUM_TOKENS, rounding=NUM_TOKENS, rows_multiple=B
    )


def of_packed(packed):
    visibility = attention.Visibility(
        segment=jnp.asarray(packed.segment), prefix=jnp.asarray(packed.prefix)
    )
    return packed.tokens, packed.positions, visibility


def test_a_packed_branch_equals_its_own_row(params):
    packed = packed_rows()
    logits, _ = forward(params, *of_packed(packed))
    rule = packing.visible(packed)
    num_rows, width = packed.tokens.shape
    checked = 0
    for row in range(num_rows):
        for segment in range(packed.segment[row].max() + 1):
            end = np.flatnonzero(packed.segment[row] == segment)[-1]
            path = np.flatnonzero(rule[row, end])
            alone = np.zeros((B, NUM_TOKENS), int)
            alone[0, : len(path)] = packed.tokens[row, path]
            expected, _ = causal(params, alone)
            np.testing.assert_allclose(
                logits[row, path], expected[0, : len(path)], atol=1e-5
            )
            checked += 1
    assert checked == 8


def test_invisible_tokens_have_no_gradient(params, monkeypatch):
    # Several blocks of queries in a row.
    monkeypatch.setitem(attention.attend_fresh.__kwdefaults__, "block", 6)
    packed = packed_rows()
    rule = packing.visible(packed)
    used = packed.segment >= 0
    direction = np.random.default_rng(0).normal(size=CFG.vocab_size)

    @jit
    @jax.jacrev
    def jacobian(embed):
        given = params.replace(embed=embed)
        out = transformer.forward(given, CFG, *of_packed(packed))
        return transformer.logits(given, out.hidden) @ direction

    slopes = np.abs(jacobian(params.embed)).max(-1)  # [B, T, V]
    for row, t in zip(*np.nonzero(used), strict=True):
        # Token ids are unique, so a column of the Jacobian is a token's.
        seen = np.isin(
            np.arange(CFG.vocab_size), packed.tokens[row, rule[row, t] & used[row]]
        )
        assert np.all(slopes[row, t][~seen] == 0)
        assert slopes[row, t][packed.tokens[row, t]] > 0
        if rule[row, t].sum() > 1:
            assert np.count_nonzero(slopes[row, t]) == seen.sum()


def test_gradients_are_those_of_differences_however_computed(params, tokens):
    positions = np.broadcast_to(np.arange(NUM_TOKENS), tokens.shape)

    @functools.partial(jit, static_argnums=1)
    @jax.value_and_grad
    def total(params, remat):
        out = transformer.forward(params, CFG, tokens, positions, remat=remat)
        law = jax.nn.log_softmax(transformer.logits(params, out.hidden))
        return -jnp.mean(jnp.take_along_axis(law, tokens[..., None], -1))

    slopes = jax.tree.map(np.asarray, total(params, "none")[1])
    # Along a way that raises the loss in every leaf alike.
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(slopes)]
    step = 3e-3
    up, down = (
        total(
            jax.tree.map(
                lambda x, slope, s=s: x + s * slope / np.linalg.norm(slope),
                jax.tree.map(np.asarray, params),
                slopes,
            ),
            "none",
        )[0]
        for s in (step, -step)
    )
    along = sum(norms)
    np.testing.assert_allclose(along, (up - down) / (2 * step), rtol=1e-3)

    for remat in ("full", "dots"):
        _, again = total(params, remat)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slopes, again
        )
    # The policies do something: what is kept differs.
    num_products = {
        remat: total.lower(params, remat).as_text().count("dot_general")
        for remat in transformer.REMAT_POLICIES
    }
    assert num_products["full"] > num_products["none"]
    assert num_products["full"] > num_products["dots"]


def test_bfloat16_activations_stay_near(params, tokens):
    exact, _ = causal(params, tokens)
    logits, out = causal(params, tokens, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    assert out.hidden.dtype == out.features[0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(out.keys)} == {jnp.bfloat16.dtype}
    error = np.abs(np.asarray(logits) - exact)
    assert 1e-4 < error.mean() < 0.03 and error.max() < 0.3


def test_constrain_sees_the_activations_between_layers(params, tokens):
    shapes = []
    positions = np.broadcast_to(np.arange(NUM_TOKENS), tokens.shape)

    def note(x):
        shapes.append(x.shape)
        return x

    given = model_params.unstack(params)
    jax.eval_shape(
        lambda params: transformer.forward(
            params, CFG, tokens, positions, constrain=note
        ),
        given,
    )
    assert shapes == [(CFG.d_model, B, NUM_TOKENS)] * (CFG.num_layers + 1)


def test_settings_that_mean_nothing_are_refused(params, tokens):
    with pytest.raises(ValueError, match="remat='some': use one of none, full, dots"):
        transformer.forward(params, CFG, tokens, tokens, remat="some")
    for bad in ((3,), (-1, 0)):
        with pytest.raises(ValueError, match="num_layers=3: use 0 to 2"):
            transformer.forward(params, CFG, tokens, tokens, features=bad)
