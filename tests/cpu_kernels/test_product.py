"""The native product: right for every shape, the same bits for every batch."""

import concurrent.futures
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.cpu_kernels import hosts
from tlt_jax.cpu_kernels import choice, code, ffi, job, product
from tlt_jax.models import kernels, layers

pytestmark = hosts.needs_native


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def one_by_one(weight, x):
    """Multiply by a chain of fused additions, in numbers that round like it."""
    total = np.zeros((weight.shape[0], x.shape[1]), np.float32)
    for k in range(weight.shape[1]):
        # A product of two float32 is exact in float64.
        exact = weight[:, k, None].astype(np.float64) * x[k].astype(np.float64)
        total = (total.astype(np.float64) + exact).astype(np.float32)
    return total


@pytest.mark.parametrize(
    ("rows", "size", "columns"),
    [
        *((1, 1, 1), (7, 9, 1), (16, 16, 1), (40, 37, 1), (33, 20, 2), (17, 33, 3)),
        *((50, 100, 4), (16, 1, 5), (31, 15, 8), (24, 33, 9), (3, 2, 11), (13, 7, 16)),
        *((30, 17, 17), (100, 64, 33), (9, 5, 48), (129, 77, 64), (64, 50, 65)),
        *((41, 30, 150), (700, 300, 20)),
    ],
)
def test_every_element_is_the_chain_over_k(rows, size, columns):
    weight, x = draw(rows, size), draw(size, columns, seed=1)
    found = np.asarray(product.product(weight, x))
    expected = one_by_one(weight, x)
    if ffi.has_fma(ffi.host_features()):
        # The twin rounds twice, which makes a difference once in many millions.
        assert np.mean(found != expected) < 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    turned = np.asarray(product.product_transposed(weight, x))
    np.testing.assert_array_equal(turned, found.T)


def test_axes_of_weight_and_columns_are_kept():
    weight, x = draw(2, 3, 4, 5), draw(5, 2, 7, seed=1)
    found = product.product(weight, x)
    np.testing.assert_allclose(
        found, np.tensordot(weight, x, axes=1), rtol=1e-5, atol=1e-5
    )
    head = draw(11, 5)
    turned = product.product_transposed(head, x)
    assert turned.shape == (2, 7, 11)
    np.testing.assert_array_equal(turned, np.moveaxis(product.product(head, x), 0, -1))


def test_a_column_has_the_same_bits_in_every_batch():
    weight, x = draw(70, 90), draw(90, 64, seed=1)
    whole = np.asarray(product.product(weight, x))
    for columns in range(1, 64):
        found = np.asarray(product.product(weight, x[:, -columns:]))
        np.testing.assert_array_equal(found, whole[:, -columns:], err_msg=str(columns))


def test_what_lies_beyond_a_column_does_not_matter():
    weight, x = draw(20, 30), draw(30, 3, seed=1)
    spoilt = x.copy()
    spoilt[:, 1:] = np.nan
    found = np.asarray(product.product(weight, spoilt))[:, 0]
    np.testing.assert_array_equal(found, np.asarray(product.product(weight, x))[:, 0])


@hosts.needs_x86
@pytest.mark.parametrize("cpu", hosts.LESSER_CPUS)
def test_lesser_cpus_compute_the_same(cpu):
    features = hosts.LESSER_CPUS[cpu]
    ffi.register(
        product.kernel(features), {f"test_product_{cpu}": "tlt_jax_product"}, cpu
    )
    for rows, size, columns in ((5, 9, 1), (33, 40, 3), (29, 31, 17), (64, 50, 70)):
        weight, x = draw(rows, size), draw(size, columns, seed=1)
        call = jax.ffi.ffi_call(
            f"test_product_{cpu}", jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        )
        found, expected = np.asarray(call(weight, x)), product.product(weight, x)
        if ffi.has_fma(features):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_code_for_arm_is_valid():
    assert "fmla" in hosts.arm_assembly(product.kernel(frozenset({"neon"})))


def chain(weight, x, steps):
    """Multiply over and over in a loop on the device, which has all threads."""
    multiply = jax.ffi.ffi_call(
        "test_product_all_threads", jax.ShapeDtypeStruct(x.shape, jnp.float32)
    )

    def step(state):
        i, x = state
        return i + 1, jnp.tanh(multiply(weight, x))

    return lax.while_loop(lambda state: state[0] < steps, step, (0, x))[1]


def test_threads_at_once_in_loops():
    """Programs that share the threads of the pool disturb each other in nothing."""
    ffi.register(
        product.kernel(ffi.host_features()),
        {"test_product_all_threads": "tlt_jax_product"},
        num_devices=1,
    )
    weight = draw(256, 256)
    columns = [draw(256, n, seed=n) for n in (1, 3, 8, 20)]
    run = jax.jit(chain)
    expected = [np.asarray(run(weight, x, 40)) for x in columns]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda x: np.asarray(run(weight, x, 40)), columns)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def threads_kernel() -> code.Module:
    """A kernel that tells how many threads it may have."""
    kernel = job.begin(fused=True)
    with job.handler(kernel, "threads") as (builder, call):
        builder.put(builder.trunc(call.threads(), code.I32), call.result(0), 0)
    return kernel


def test_each_device_has_its_share_of_the_threads():
    def count(num_devices):
        name = f"test_threads_{num_devices}"
        ffi.register(threads_kernel(), {name: "threads"}, num_devices=num_devices)
        call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((), jnp.int32))
        return int(call())

    whole = count(1)
    assert whole > 1
    assert count(2) == max(whole // 2, 1) and count(1000) == 1
    # As kernels are registered: what all of them use at a time is no more than that.
    assert count(None) == max(whole // len(jax.devices("cpu")), 1)


PROGRAM = """
import hashlib, sys
import jax, numpy as np
from tlt_jax.cpu_kernels import choice, product
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
choice.choose("native", jax.devices()[:1], np.float32)
rng = np.random.default_rng(0)
weight = rng.standard_normal((300, 300), np.float32)
x = rng.standard_normal((300, 6), np.float32)
found = np.asarray(jax.jit(product.product)(weight, x))
print(hits.count("/jax/compilation_cache/cache_hits"), end=" ")
print(hashlib.sha256(found.tobytes()).hexdigest())
"""


def test_fresh_processes_load_it_from_the_cache_and_need_no_threads(tmp_path):
    def run(**env):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        done = subprocess.run(
            command,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout.split()

    first_hits, first = run()
    # XLA's pool takes its size from it.
    second_hits, second = run(NPROC="1")
    assert (first_hits, second_hits) == ("0", "1")
    assert first == second


def test_layers_take_it_for_few_columns_only():
    native = kernels.Kernels(products="native")
    weight = draw(12, 8)
    for columns, is_native in ((256, True), (257, False)):
        x = draw(8, columns, 1)
        text = jax.jit(lambda w, x: layers.product(w, x, native)).lower(weight, x)
        assert ("tlt_jax_product" in text.as_text()) == is_native
    assert "tlt_jax" not in jax.jit(layers.product).lower(weight, x[:, :1]).as_text()


def test_unfit_operands_and_choices_are_refused():
    with pytest.raises(ValueError, match="computes float32 only"):
        product.product(draw(3, 4).astype(np.float16), draw(4, 1))
    with pytest.raises(ValueError, match="the last axis of one"):
        product.product(draw(3, 4), draw(5, 1))
    with pytest.raises(ValueError, match="use one of auto, xla, native"):
        choice.choose("fast", jax.devices(), jnp.float32)
    with pytest.raises(ValueError, match="computes float32, not bfloat16"):
        choice.choose("native", jax.devices()[:1], jnp.bfloat16)
    with pytest.raises(ValueError, match="split over 2 devices"):
        choice.choose("native", jax.devices()[:1] * 2, jnp.float32)
    assert choice.choose("auto", jax.devices()[:1] * 2, jnp.float32) == "xla"
    assert choice.choose("auto", jax.devices()[:1], jnp.bfloat16) == "xla"
    assert choice.choose("auto", jax.devices()[:1], jnp.float32) == "native"
