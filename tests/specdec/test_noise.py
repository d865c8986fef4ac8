"""The noise is a fixed, random-looking function of (seed, request, position)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.extend import random as jax_random

from tlt_jax.models import kernels as kernels_lib
from tlt_jax.runtime import sharding
from tlt_jax.specdec import noise

gumbel = jax.jit(noise.gumbel, static_argnums=2)


def words(*values):
    return tuple(np.array([value], np.uint32) for value in values)


def threefry_twin(key, counter, rounds):
    """One block in Python integers, round by round."""
    mask = 0xFFFFFFFF
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x0, x1 = (counter[0] + key[0]) & mask, (counter[1] + key[1]) & mask
    turns = [13, 15, 26, 6, 17, 29, 16, 24]
    for i in range(rounds):
        turn = turns[i % 8]
        x0 = (x0 + x1) & mask
        x1 = ((x1 << turn) | (x1 >> (32 - turn))) & mask
        x1 ^= x0
        if (i + 1) % 4 == 0:
            n = (i + 1) // 4
            x0 = (x0 + schedule[n % 3]) & mask
            x1 = (x1 + schedule[(n + 1) % 3] + n) & mask
    return x0, x1


ONES = 0xFFFFFFFF
PI = (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)


# The generator's published known answers.
@pytest.mark.parametrize(
    "rounds,key,counter,expected",
    [
        (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        (13, (ONES, ONES), (ONES, ONES), (0xFD36D048, 0x2D17272C)),
        (13, *PI, (0xBA3E4725, 0xF27D669E)),
        (20, (0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (20, (ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        (20, *PI, (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(rounds, key, counter, expected):
    ours = noise.threefry2x32(words(*key), words(*counter), rounds)
    assert ours == words(*expected)
    traced = jax.jit(noise.threefry2x32, static_argnums=2)
    assert traced(words(*key), words(*counter), rounds) == words(*expected)
    assert threefry_twin(key, counter, rounds) == expected
    if rounds == noise.ROUNDS:
        assert noise.threefry2x32(words(*key), words(*counter)) == words(*expected)


def test_twenty_rounds_equal_those_of_jax():
    rng = np.random.default_rng(0)
    for key in rng.integers(0, 2**32, (4, 2), np.uint32):
        counter = rng.integers(0, 2**32, 200, np.uint32)
        theirs = np.asarray(jax_random.threefry_2x32(jnp.asarray(key), counter))
        ours = noise.threefry2x32(tuple(key[:, None]), tuple(np.split(counter, 2)), 20)
        np.testing.assert_array_equal(np.concatenate(ours), theirs)


@pytest.mark.parametrize("vocab_size", [1, 7, 64])
def test_noise_equals_its_definition(vocab_size):
    keys = noise.request_keys(5, [0, 9])
    positions = np.array([3, 2**31 - 1], np.int32)
    half = (vocab_size + 1) // 2
    expected = np.zeros((2, vocab_size))
    for row in range(2):
        key = tuple(map(int, keys[row]))
        for v in range(vocab_size):
            block = threefry_twin(key, (int(positions[row]), v % half), 13)
            u = np.float32(block[v // half] >> 1) + np.float32(0.5)
            u = min(np.float64(u) * 2.0**-31, 1 - 2.0**-24)
            expected[row, v] = -np.log(-np.log1p(-u))
    np.testing.assert_allclose(
        gumbel(keys, positions, vocab_size), expected, rtol=1e-6, atol=1e-6
    )


def test_keys_of_steps_and_uniform_numbers_equal_their_definition():
    keys = noise.request_keys(5, [0, 9])
    lengths = np.array([0, 2**31 - 1], np.int32)
    derived = jax.jit(noise.step_keys, static_argnums=2)(keys, lengths, 3)
    drawn = jax.jit(noise.uniform)(keys, lengths)
    for row, length in enumerate(lengths.tolist()):
        key = tuple(map(int, keys[row]))
        for purpose in range(3):
            # The top bit: no position has it.
            block = threefry_twin(key, (length + 2**31, purpose), 20)
            assert tuple(map(int, derived[purpose, row])) == block
        assert drawn[row] == (threefry_twin(key, (length, 0), 13)[0] >> 8) / 2**24


def test_request_keys_equal_their_definition():
    seed, ids = 3 + 7 * 2**32, [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1]
    keys = noise.request_keys(seed, ids)
    assert keys.dtype == np.uint32
    for key, i in zip(keys, ids, strict=True):
        block = threefry_twin((7, 3), (i >> 32, i & ONES), 20)
        assert tuple(map(int, key)) == block
    np.testing.assert_array_equal(noise.request_keys(seed, np.array(ids[:5])), keys[:5])
    assert noise.request_keys(seed, []).shape == (0, 2)
    # Cut to 32 bits some of these would be the same request, or the same run.
    assert len({tuple(key) for key in keys}) == len(ids)
    assert (noise.request_keys(3, ids) != keys).any(axis=1).all()


@pytest.mark.parametrize(
    "bad", [-1, 2**64, 1.5, np.int64(-1), np.float32(2), "7", None]
)
def test_seeds_and_ids_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=r"integer in \[0, 2\*\*64\)"):
        noise.request_keys(0, [3, bad])
    with pytest.raises(ValueError, match=r"integer in \[0, 2\*\*64\)"):
        noise.request_keys(bad, [3])
    with pytest.raises(ValueError, match="-4"):
        noise.request_keys(0, np.array([-4]))


GOLDEN_KEYS = [
    [1832780943, 270669613],
    [64467757, 2916123636],
    [1061814078, 3337432239],
]
GOLDEN_ARGMAX = [544, 6440, 7897]
GOLDEN_NOISE = [
    [1.6402658, -1.7374622, -0.1563715],
    [-0.02051691, 1.0931542, 0.39431387],
    [-1.5692856, 0.97562134, 0.67948675],
]


# Golden values: whoever changes the stream must see it and mean it, because recorded
# runs and their continuations depend on it.
def test_the_stream_stays_what_it_was():
    keys = noise.request_keys(42, [0, 1, 2**40 + 5])
    np.testing.assert_array_equal(keys, GOLDEN_KEYS)
    drawn = gumbel(keys, np.array([0, 1, 70_000], np.int32), 50_257)
    np.testing.assert_array_equal(np.argmax(drawn, -1), GOLDEN_ARGMAX)
    np.testing.assert_allclose(drawn[:, :: 50_256 // 2], GOLDEN_NOISE, rtol=2e-6)


@pytest.mark.parametrize("vocab_size", [61, 64])
def test_noise_depends_on_seed_request_and_position_alone(vocab_size):
    ids = [0, 1, 7, 2**33, 2**33 + 1, 5, 12, 99]
    positions = np.array([0, 3, 3, 900, 4, 17, 1, 2], np.int32)
    keys = noise.request_keys(11, ids)
    whole = np.asarray(gumbel(keys, positions, vocab_size))
    assert whole.shape == (8, vocab_size) and whole.dtype == np.float32

    rng = np.random.default_rng(0)
    for bucket in (1, 3, 16):
        rows = rng.permutation(np.arange(bucket) % 8)
        ours = gumbel(keys[rows], positions[rows], vocab_size)
        np.testing.assert_array_equal(ours, whole[rows])
    # Inside a loop, as decode programs have it, next to other computations.
    looped = jax.lax.fori_loop(
        0,
        2,
        lambda i, _: noise.gumbel(jnp.asarray(keys), positions + i - 1, vocab_size),
        jnp.zeros((8, vocab_size)),
    )
    np.testing.assert_array_equal(looped, whole)


def test_other_seeds_requests_and_positions_have_other_noise():
    triples = [(s, r, t) for s in (0, 1) for r in (0, 1, 2**32) for t in (0, 1, 2)]
    keys = np.concatenate([noise.request_keys(s, [r]) for s, r, _ in triples])
    positions = np.array([t for *_, t in triples], np.int32)
    drawn = np.asarray(gumbel(keys, positions, 20_000), np.float64)
    correlation = np.corrcoef(drawn) - np.eye(len(triples))
    assert np.max(np.abs(correlation)) < 4.5 / np.sqrt(20_000)
    # The two words of one block, and neighbours in the vocabulary.
    for left, right in (
        (drawn[:, :10_000], drawn[:, 10_000:]),
        (drawn[:, 1:], drawn[:, :-1]),
    ):
        r = np.corrcoef(left.ravel(), right.ravel())[0, 1]
        assert abs(r) < 4.5 / np.sqrt(left.size)


def test_noise_is_gumbel():
    keys = noise.request_keys(0, range(10))
    drawn = np.asarray(gumbel(keys, np.arange(10, dtype=np.int32), 20_000), np.float64)
    assert abs(drawn.mean() - np.euler_gamma) < 4 * 1.2825 / np.sqrt(drawn.size)
    assert abs(drawn.var() - np.pi**2 / 6) < 0.04
    assert scipy.stats.kstest(drawn.ravel(), "gumbel_r").pvalue > 0.01
    # The upper tail decides rare tokens: exceedances of 8 are Poisson with mean 67.
    expected = drawn.size * -np.expm1(-np.exp(-8.0))
    assert abs(np.sum(drawn > 8) - expected) < 4 * np.sqrt(expected)


def test_every_word_gives_a_finite_number_that_rises_with_it(monkeypatch):
    edges = np.array([0, 1, 2, 3, 2**24, 2**31, ONES - 513, ONES - 1, ONES], np.uint32)
    monkeypatch.setattr(
        noise, "threefry2x32", lambda *_: (jnp.asarray(edges[None]),) * 2
    )
    drawn = noise.gumbel(np.zeros((1, 2), np.uint32), np.zeros(1, np.int32), 18)
    drawn = np.asarray(drawn)[0, :9]
    assert np.all(np.isfinite(drawn))
    uniform = noise.uniform(np.zeros((1, 2), np.uint32), np.zeros(1, np.int32))
    uniform = np.asarray(uniform)[0]
    assert np.all((uniform >= 0) & (uniform < 1)) and np.all(np.diff(uniform) >= 0)
    assert np.all(np.diff(drawn) <= 0)
    np.testing.assert_allclose(drawn[0], np.log(2.0**32), rtol=1e-6)
    np.testing.assert_allclose(drawn[-1], -np.log(24 * np.log(2)), rtol=1e-6)


@pytest.mark.parametrize("vary", ["position", "request"])
def test_the_largest_score_is_a_sample_of_the_law(vary):
    probs = np.array([0.5, 0.2, 0.15, 0.1, 0.03, 0.015, 0.005])
    num = 20_000
    if vary == "position":
        keys = np.repeat(noise.request_keys(3, [8]), num, axis=0)
        positions = np.arange(num, dtype=np.int32)
    else:
        keys, positions = noise.request_keys(3, range(num)), np.full(num, 6, np.int32)
    drawn = np.argmax(np.log(probs) + np.asarray(gumbel(keys, positions, 7)), axis=-1)
    counts = np.bincount(drawn, minlength=7)
    assert scipy.stats.chisquare(counts, probs * num).pvalue > 0.01
    # Successive draws are independent.
    pairs = np.histogram2d(drawn[1:] == 0, drawn[:-1] == 0, bins=2)[0]
    assert scipy.stats.chi2_contingency(pairs).pvalue > 0.01


@pytest.mark.parametrize("vocab_size", [10, 11])
def test_some_entries_are_those_of_the_whole(vocab_size):
    keys, positions = noise.request_keys(3, [0, 5]), jnp.array([4, 9])
    ids = jnp.array([0, 4, 5, 6, 9])
    found = noise.gumbel_at(keys, positions, ids, vocab_size)
    whole = noise.gumbel(keys, positions, vocab_size)
    np.testing.assert_array_equal(found, whole[:, ids])


@pytest.mark.parametrize("vocab_size", [16, 17])
def test_devices_that_split_the_vocabulary_make_the_same_noise(vocab_size):
    mesh = sharding.make_mesh(1, 2, 4)
    split = kernels_lib.Split(mesh, sharding.ShardingRules())
    kernels = dataclasses.replace(kernels_lib.PORTABLE, split=split)
    keys, positions = noise.request_keys(3, [0, 5]), jnp.array([4, 9])
    where = sharding.named(mesh, split.rules, ("batch", "vocab"), (2, vocab_size), True)
    made = jax.jit(noise.gumbel, static_argnums=(2, 3), out_shardings=where)
    compiled = made.lower(keys, positions, vocab_size, kernels).compile()
    found = compiled(keys, positions)
    np.testing.assert_array_equal(found, gumbel(keys, positions, vocab_size))
    # Each makes its part, and none needs another's.
    for exchange in ("all-to-all", "all-gather", "collective-permute", "all-reduce"):
        assert f" {exchange}" not in compiled.as_text()
    if vocab_size == 16:
        assert found.addressable_shards[0].data.shape == (1, 4)
    # Where it is not split, each word that is made is used.
    alone = dataclasses.replace(split, mesh=sharding.make_mesh(8, 1, 1))
    assert not dataclasses.replace(kernels, split=alone).splits_vocab
