"""The native product of many experts: every column is its expert's plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cpu_kernels import hosts
from tlt_jax.cpu_kernels import ffi, grouped, product

pytestmark = hosts.needs_native


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def experts_of(num, count, seed=2):
    return np.random.default_rng(seed).integers(0, num, count).astype(np.int32)


def one_by_one(weight, x, experts):
    """Multiply each column by its expert alone, with the native product."""
    columns = [
        np.asarray(product.product(weight[expert], x[:, m % x.shape[1]][:, None]))
        for m, expert in enumerate(experts)
    ]
    return np.concatenate(columns, axis=-1)


@pytest.mark.parametrize(
    ("num", "out", "size", "columns", "choices"),
    [
        *((4, (40,), 37, 3, 6), (8, (2, 33), 50, 5, 15), (3, (5,), 9, 4, 4)),
        # More columns of an expert than any block has.
        *((2, (70,), 40, 150, 150), (1, (17,), 16, 1, 1)),
    ],
)
def test_a_column_has_the_bits_of_its_experts_product(num, out, size, columns, choices):
    weight, x = draw(num, *out, size), draw(size, columns, seed=1)
    experts = experts_of(num, choices)
    found = np.asarray(grouped.product(weight, x, experts))
    assert found.shape == (*out, choices)
    np.testing.assert_array_equal(found, one_by_one(weight, x, experts))


def test_what_other_columns_hold_does_not_matter():
    weight, x = draw(3, 20, 30), draw(30, 4, seed=1)
    experts = np.int32([1, 0, 1, 1])
    expected = np.asarray(grouped.product(weight, x, experts))[:, 0]
    spoilt = x.copy()
    spoilt[:, 1:] = np.nan
    found = np.asarray(grouped.product(weight, spoilt, experts))[:, 0]
    np.testing.assert_array_equal(found, expected)


def test_experts_that_are_not_there_are_not_read():
    weight, x = draw(2, 20, 30), draw(30, 3, seed=1)
    found = np.asarray(grouped.product(weight, x, np.int32([7, 1, -1])))
    expected = one_by_one(weight, x[:, 1:2], [1])
    np.testing.assert_array_equal(found[:, 1:2], expected)


@hosts.needs_x86
@pytest.mark.parametrize("cpu", hosts.LESSER_CPUS)
def test_lesser_cpus_compute_the_same(cpu):
    features, target = hosts.LESSER_CPUS[cpu], f"test_grouped_{cpu}"
    ffi.register(grouped.kernel(features), {target: "tlt_jax_grouped_product"}, cpu)
    for rows, size, columns in ((5, 9, 1), (33, 40, 9), (64, 50, 70)):
        weight, x = draw(3, rows, size), draw(size, columns, seed=1)
        experts = experts_of(3, columns)
        shape = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        found = np.asarray(jax.ffi.ffi_call(target, shape)(weight, x, experts))
        expected = np.asarray(grouped.product(weight, x, experts))
        if ffi.has_fma(features):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_code_for_arm_is_valid():
    assert "fmla" in hosts.arm_assembly(grouped.kernel(frozenset({"neon"})))


def test_misfits_are_refused():
    weight, x, experts = draw(3, 5, 4), draw(4, 2), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match="columns of float16"):
        grouped.product(weight, x.astype(np.float16), experts)
    with pytest.raises(ValueError, match=r"shape \(4, 2\) and 3 experts"):
        grouped.product(weight, x, experts[:3])
