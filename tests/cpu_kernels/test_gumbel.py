"""The native noise and draw: right for every width, the same bits for every batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.cpu_kernels import hosts
from tlt_jax.cpu_kernels import choice, ffi, gumbel
from tlt_jax.models import kernels
from tlt_jax.specdec import calibration, noise, sampling

pytestmark = hosts.needs_native

# Odd and even, below a vector's and a block's size, across several blocks.
WIDTHS = (1, 2, 17, 255, 256, 257, 5003)
make = jax.jit(
    functools.partial(noise.gumbel, kernels=kernels.NATIVE), static_argnums=2
)
draw = jax.jit(gumbel.draw)


def rows(count, seed=0):
    """Draw keys and positions, the last possible position among them."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 2**31, count, np.int32)
    positions[-1] = 2**31 - 1
    return rng.integers(0, 2**32, (count, 2), np.uint32), positions


def twin(keys, positions, vocab_size):
    """The noise of the same words with logarithms of 64 bits."""
    counters = np.arange((vocab_size + 1) // 2, dtype=np.uint32)
    with np.errstate(over="ignore"):
        words = noise.threefry2x32(
            (keys[:, :1], keys[:, 1:]),
            (positions.astype(np.uint32)[:, None], counters[None]),
        )
    kept = np.concatenate(words, axis=1)[:, :vocab_size] >> np.uint32(1)
    u = (kept.astype(np.int32).astype(np.float32) + np.float32(0.5)) * 2.0**-31
    return -np.log(-np.log1p(-np.minimum(u.astype(np.float64), 1 - 2.0**-24)))


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_noise_is_that_of_its_definition(vocab_size):
    keys, positions = rows(3)
    found = make(keys, positions, vocab_size)
    assert found.dtype == jnp.float32
    expected = twin(keys, positions, vocab_size)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=2e-7)
    portable = noise.gumbel(*map(jnp.asarray, (keys, positions)), vocab_size)
    np.testing.assert_allclose(found, portable, rtol=5e-7, atol=4e-7)


def test_extreme_words_stay_finite_and_accurate():
    # Among 2^23 words are some within 2^-21 of either end.
    keys, positions = rows(1)
    found = np.asarray(make(keys, positions, 2**23))
    expected = twin(keys, positions, 2**23)
    assert expected.max() > 14 and expected.min() < -2.6
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=2e-7)


def test_an_entry_has_the_same_bits_in_every_batch():
    keys, positions = rows(9)
    whole = np.asarray(make(keys, positions, 5003))
    for chosen in ([4], [8, 0], [3, 3, 1, 2, 7, 5]):
        some = make(keys[chosen], positions[chosen], 5003)
        np.testing.assert_array_equal(some, whole[chosen])


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_a_draw_is_the_first_largest_sum(vocab_size):
    rng = np.random.default_rng(vocab_size)
    # Few values, so that many are equal.
    scores = rng.integers(0, 3, (8, vocab_size)).astype(np.float32)
    chance = rng.integers(0, 3, (3, vocab_size)).astype(np.float32)
    scores[1] = -np.inf
    scores[2, 1:][rng.random(vocab_size - 1) < 0.8] = -np.inf
    scores[3, vocab_size // 2] = np.nan
    scores[4, vocab_size - 1] = 9
    scores[5] = -1e30
    which = rng.integers(0, 3, 8, np.int32)
    expected = np.argmax(np.nan_to_num(scores, neginf=-1e38) + chance[which], axis=-1)
    expected[1], expected[3] = 0, vocab_size - 1
    assert expected[4] == vocab_size - 1
    np.testing.assert_array_equal(draw(scores, chance, which), expected)


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_a_rank_is_the_largest_sum_its_share_and_slopes(vocab_size):
    rng = np.random.default_rng(vocab_size)
    scores = 3 * rng.standard_normal((5, vocab_size), np.float32)
    chance = rng.gumbel(size=(2, vocab_size)).astype(np.float32)
    which = np.array([1, 0, 1, 1, 0], np.int32)
    sums = np.float64(1.7) * scores + chance[which]
    for tau in (0.3, 1.0):
        made = jax.jit(gumbel.rank)(scores, chance, which, 1.7, tau)
        ids, shares, *slopes = made
        np.testing.assert_array_equal(ids, np.argmax(sums, axis=-1))
        expected = scipy.special.log_softmax(sums / tau, axis=-1)
        expected = np.take_along_axis(expected, np.asarray(ids)[:, None], axis=-1)
        np.testing.assert_allclose(shares, expected[:, 0], rtol=2e-5, atol=2e-6)
        wanted = calibration.slopes(scores, sums / tau, ids[:, None], 1.7 / tau)
        for found, other in zip(slopes, jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(found, other[:, 0], rtol=1e-4, atol=2e-5)


def test_laws_draw_with_their_own_noise():
    rng = np.random.default_rng(1)
    law = sampling.Law(
        jnp.asarray(rng.standard_normal((4, 6, 300), np.float32)), jnp.zeros((4, 6))
    )
    chance = jnp.asarray(rng.standard_normal((4, 3, 300), np.float32))
    which = jnp.asarray(rng.integers(0, 3, (4, 6), np.int32))
    expected = law.draw(chance, which)
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(law.draw(chance, which, kernels.NATIVE), expected)
    each = jnp.take_along_axis(chance, which[..., None], axis=1)
    np.testing.assert_array_equal(law.draw(each, kernels=kernels.NATIVE), expected)
    # One column of noise stands for equal ones: the mode.
    none = jnp.zeros((4, 3, 1))
    np.testing.assert_array_equal(
        law.draw(none, which, kernels.NATIVE), np.argmax(law.scores, axis=-1)
    )


@hosts.needs_x86
@pytest.mark.parametrize("cpu", hosts.LESSER_CPUS)
def test_lesser_cpus_compute_the_same(cpu):
    fused = ffi.has_fma(hosts.LESSER_CPUS[cpu])
    names = {f"test_gumbel_{cpu}": gumbel.NOISE, f"test_draw_{cpu}": gumbel.DRAW}
    ffi.register(gumbel.kernel(fused), names, cpu)
    keys, positions = rows(2)
    expected = make(keys, positions, 777)
    kind = jax.ShapeDtypeStruct(expected.shape, jnp.float32)
    found = jax.ffi.ffi_call(f"test_gumbel_{cpu}", kind)(keys, positions)
    if fused:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=5e-7, atol=4e-7)
    which = np.array([1, 0], np.int32)
    kind = jax.ShapeDtypeStruct((2,), jnp.int32)
    drawn = jax.ffi.ffi_call(f"test_draw_{cpu}", kind)(found, 2 * found, which)
    np.testing.assert_array_equal(drawn, draw(found, 2 * found, which))


def test_code_for_arm_is_valid():
    assert "fmla" in hosts.arm_assembly(gumbel.kernel(True))


def test_unfit_operands_are_refused():
    keys, positions = rows(2)
    with pytest.raises(ValueError, match=r"keys is uint32\[2, 1\].*uint32\[2, 2\]"):
        gumbel.gumbel(keys[:, :1], positions, 8)
    with pytest.raises(ValueError, match="positions is uint32"):
        gumbel.gumbel(keys, positions.astype(np.uint32), 8)
    scores = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"noise is float32\[1, 7\]"):
        gumbel.draw(scores, scores[:1, :7], np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"which is int32\[3\]"):
        gumbel.draw(scores, scores, np.zeros(3, np.int32))


def test_it_is_registered_before_programs_are_traced():
    """Threads that traced side by side would register it twice."""
    gumbel.register()  # What the kernel is for others stays as it is.
    gumbel.register.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        names = []
        patch.setattr(ffi, "register", lambda text, found, **_: names.extend(found))
        choice.choose("native", jax.devices()[:1], jnp.float32)
        assert gumbel.NOISE in names
    assert gumbel.register.cache_info().currsize == 1
