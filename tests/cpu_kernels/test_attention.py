"""The native attention: right for every shape, the same bits for every batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cpu_kernels import hosts
from tlt_jax.cpu_kernels import attention, attention_code, ffi
from tlt_jax.models import kernels
from tlt_jax.runtime import sharding

pytestmark = hosts.needs_native

LAYER = 1
# kv heads, queries of each, head dimension, tokens, page size, cached lengths; and keys
# of earlier calls that are in no page.
CASES = {
    "decode": (3, 3, 64, 1, 64, (5,)),
    "nothing cached": (1, 1, 16, 1, 16, (0, 0)),
    "ragged": (2, 2, 32, 1, 32, (0, 1, 31, 32, 33, 95, 200)),
    "tree": (2, 3, 64, 9, 64, (64, 63, 1)),
    "many tokens": (1, 4, 32, 32, 16, (7, 40)),
    "wide heads": (1, 2, 128, 3, 128, (130, 250)),
    "level of a draft": (2, 3, 32, 2, 32, (33, 0, 64), 21),
    "chain of drafts": (3, 1, 16, 1, 16, (17,), 11),
}


def draw(case, seed=0):
    """Draw the arguments of a case; what must not be read is NaN."""
    num_kv, group, head_dim, tokens, page_size, lengths, *past = case
    (past,) = past or (0,)
    rng = np.random.default_rng(seed)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    batch, lengths = len(lengths), np.array(lengths, np.int32)
    max_pages = int(lengths.max()) // page_size + 1
    table = 1 + rng.permutation(batch * max_pages).reshape(batch, max_pages)
    cache = normal((2, 2, 2 + batch * max_pages, num_kv, head_dim, page_size))
    cache[:, 1 - LAYER] = np.nan
    cache[:, :, 0] = np.nan
    for row, length in enumerate(lengths):
        for number, page in enumerate(table[row]):
            cache[:, :, page, ..., max(length - number * page_size, 0) :] = np.nan
    mask = np.tril(rng.random((batch, tokens, tokens)) < 0.6)
    mask |= np.eye(tokens, dtype=bool)
    mask = np.concatenate([rng.random((batch, tokens, past)) < 0.6, mask], 2)
    angles = normal((head_dim // 2, batch, tokens))
    return dict(
        qkv=normal((num_kv, group + 2, head_dim, batch, tokens)),
        cos=np.cos(angles),
        sin=np.sin(angles),
        cache_keys=cache[0],
        cache_values=cache[1],
        page_table=table.astype(np.int32),
        lengths=lengths,
        **side_by_side([tokens] * batch),
        mask=mask,
        past_keys=normal((num_kv, head_dim, batch, past)),
        past_values=normal((num_kv, head_dim, batch, past)),
    )


def side_by_side(counts):
    counts = np.array(counts, np.int32)
    return dict(starts=np.cumsum(counts, dtype=np.int32) - counts, counts=counts)


def turned(x, cos, sin):
    """Rotate the two halves of every head, `[..., H, B, T]`."""
    first, second = np.split(x.astype(np.float64), 2, axis=-3)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -3)


def slow_twin(args, scale):
    """Attend one query and one head at a time, in float64."""
    qkv, table, lengths = args["qkv"], args["page_table"], args["lengths"]
    page_size = args["cache_keys"].shape[-1]
    num_kv, heads, head_dim, batch, tokens = qkv.shape
    queries = turned(qkv[:, :-2], args["cos"], args["sin"])
    keys = turned(qkv[:, -2], args["cos"], args["sin"])
    values = qkv[:, -1].astype(np.float64)
    in_no_page = [
        np.concatenate([args[f"past_{name}"], fresh], axis=3)
        for name, fresh in (("keys", keys), ("values", values))
    ]
    out = np.zeros((num_kv, heads - 2, head_dim, batch, tokens))
    for k, b, t in np.ndindex(num_kv, batch, tokens):
        old = [
            (table[b, position // page_size], position % page_size)
            for position in range(lengths[b])
        ]
        fresh = np.flatnonzero(args["mask"][b, t])

        def column(name, own, k=k, b=b, old=old, fresh=fresh):
            cache = args[f"cache_{name}"]
            held = [cache[LAYER, page, k, :, slot] for page, slot in old]
            return np.array(held + [own[k, :, b, s] for s in fresh], np.float64)

        seen_keys = column("keys", in_no_page[0])
        seen_values = column("values", in_no_page[1])
        for g in range(heads - 2):
            scores = seen_keys @ queries[k, g, :, b, t] * scale
            weights = np.exp(scores - scores.max())
            out[k, g, :, b, t] = weights @ seen_values / weights.sum()
    return out, keys, values


def attend(args, scale=0.3):
    return [np.asarray(x) for x in attention.attend(**args, layer=LAYER, scale=scale)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_and_reads_nothing_else(name):
    args = draw(CASES[name])
    for found, expected in zip(attend(args), slow_twin(args, 0.3), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_a_query_has_the_same_bits_whatever_else_there_is():
    """Rows alone, and the first tokens alone, have the numbers they have in company."""
    args = draw((2, 3, 32, 6, 32, (40, 3, 64, 100), 3))
    heads, keys, values = attend(args)
    for row in range(4):
        for tokens in (1, 4, 6):
            alone = {
                name: args[name][row : row + 1]
                for name in ("page_table", "lengths", "mask")
            }
            alone["mask"] = alone["mask"][:, :tokens, : 3 + tokens]
            alone |= side_by_side([tokens])
            for name in ("past_keys", "past_values"):
                alone[name] = args[name][:, :, row : row + 1]
            for name in ("qkv", "cos", "sin"):
                alone[name] = args[name][..., row : row + 1, :tokens]
            found = attend(args | alone)
            for whole, its in zip((heads, keys, values), found, strict=True):
                np.testing.assert_array_equal(its[..., 0, :], whole[..., row, :tokens])


def test_rows_of_different_widths_have_the_bits_of_equal_ones():
    """Columns side by side, one row without any, and spare ones behind them."""
    counts = (4, 0, 6, 1)
    args = draw((2, 3, 32, 6, 32, (40, 3, 64, 100), 3))
    heads, keys, values = attend(args)
    taken = [(row, t) for row, count in enumerate(counts) for t in range(count)]
    row, t = np.array(taken + [(0, 5), (3, 5)]).T
    ragged = side_by_side(counts)
    for name in ("qkv", "cos", "sin"):
        ragged[name] = args[name][..., row, t][..., None, :]
    found = attend(args | ragged)
    assert found[0].shape == (2, 3, 32, 1, 13)
    for whole, its in zip((heads, keys, values), found, strict=True):
        expected = whole[..., row[:11], t[:11]]
        np.testing.assert_array_equal(its[..., 0, :11], expected)


def test_what_is_not_visible_among_fresh_keys_may_be_anything():
    args = draw((1, 2, 16, 5, 16, (20,)))
    args["mask"][:] = np.eye(5, dtype=bool)
    expected = attend(args)[0][..., :1]
    args["qkv"][..., 1:] = np.nan
    np.testing.assert_array_equal(attend(args)[0][..., :1], expected)


def test_large_scores_neither_overflow_nor_lose_the_smaller():
    args = draw((1, 1, 32, 2, 32, (70,)))
    args["qkv"][:, :2] *= 40
    found, expected = attend(args, 1.0)[0], slow_twin(args, 1.0)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


@hosts.needs_x86
@pytest.mark.parametrize("cpu", hosts.LESSER_CPUS)
def test_lesser_cpus_compute_the_same(cpu):
    features = hosts.LESSER_CPUS[cpu]
    fused = ffi.has_fma(features)
    kernel = attention_code.kernel(fused)
    name = f"test_attention_{cpu}"
    ffi.register(kernel, {name: attention_code.HANDLER}, cpu)
    args = draw(CASES["tree"])
    expected = attend(args)
    kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in expected]
    numbers = np.int32(LAYER), np.float32(0.3)
    found = jax.ffi.ffi_call(name, kinds)(*args.values(), *numbers)
    for ours, theirs in zip(found, expected, strict=True):
        if fused:
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_code_for_arm_is_valid():
    assert "fmla" in hosts.arm_assembly(attention_code.kernel(True))


def test_unfit_operands_and_choices_are_refused():
    args = draw(CASES["decode"])
    with pytest.raises(ValueError, match="mask is float32"):
        attend(args | {"mask": args["mask"].astype(np.float32)})
    with pytest.raises(ValueError, match="lengths is int32\\[2\\]"):
        attend(args | {"lengths": np.zeros((2,), np.int32)})
    with pytest.raises(ValueError, match="page_size=8.*multiples of 16"):
        attend(draw((1, 1, 16, 1, 8, (3,))))
    assert not attention.takes(attention.MOST_TOKENS + 1, 64, 64)
    assert not attention.takes(1, 40, 64) and not attention.takes(1, 64, 8)
    assert attention.takes(attention.MOST_TOKENS, 80, 16)

    def choose(cpu_kernels, asked, dtype=jnp.float32):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        rules = sharding.ShardingRules()
        return kernels.choose(cpu_kernels, asked, mesh, rules, dtype)

    assert choose("auto", "auto").native_attention
    assert not choose("auto", "portable").native_attention
    assert not choose("xla", "auto").native_attention
    with pytest.raises(ValueError, match="native_cpu.*goes with native products"):
        choose("xla", "native_cpu")
    with pytest.raises(ValueError, match="native_cpu.*goes with native products"):
        choose("auto", "native_cpu", jnp.bfloat16)
