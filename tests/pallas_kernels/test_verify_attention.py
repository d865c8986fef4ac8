"""Every implementation of verification attention on the same arguments.

Kernels are interpreted on the CPU. With `-m device` the same suite runs them on the
accelerator that is there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_kernels import suite
from tlt_jax.pallas_kernels.verify_attention import (
    api,
    arg_specs,
    page_layout,
    pallas_gpu,
    tpu_plan,
)
from tlt_jax.runtime import sharding


@pytest.mark.parametrize("spec", arg_specs.SUITE, ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", ["reference", *suite.INTERPRETED])
def test_attention_is_that_of_one_query_at_a_time(name, spec):
    suite.assert_right(spec, suite.INTERPRETED.get(name, suite.REFERENCE))


@pytest.mark.device
@pytest.mark.parametrize("spec", arg_specs.SUITE, ids=lambda spec: spec.name)
def test_attention_on_the_device(spec):
    name = api.for_platform(jax.default_backend())
    if name is None:
        pytest.skip("JAX_PLATFORMS names no accelerator that has a kernel")
    packing = page_layout.packing(name, spec.page_size, spec.head_dim)
    suite.assert_right(spec, api.Implementation(name), packing)


@pytest.mark.parametrize("name", ["reference", *suite.INTERPRETED])
def test_packed_pages_hold_the_same(name):
    """As a cache for TPUs gives them, with room for more features than there are."""
    spec = arg_specs.ArgSpec("packed", (31, 0, 48), 3, num_kv=1, head_dim=80)
    arguments = arg_specs.make(spec)
    implementation = suite.INTERPRETED.get(name, suite.REFERENCE)
    out, logs = suite.run(spec, implementation, arguments)
    packing = page_layout.packing("mosaic_tpu", spec.page_size, spec.head_dim)
    assert (packing, page_layout.padded(80, packing)) == (8, 128)
    given = suite.packed(spec, arguments, packing)
    assert given["cache_keys"].shape[3:] == (16, 128)
    unpacked = page_layout.unpack(given["cache_keys"], packing)
    np.testing.assert_array_equal(unpacked[..., :80, :], arguments["cache_keys"])
    again, again_logs = suite.run(spec, implementation, given, packing=packing)
    np.testing.assert_allclose(again, out, atol=1e-6, rtol=0)
    np.testing.assert_allclose(again_logs, logs, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"cache_keys has shape .*128\), but"):
        api.verify_attention(**given, scale=spec.scale, implementation=implementation)


@pytest.mark.parametrize("name", suite.INTERPRETED)
def test_a_rows_numbers_do_not_depend_on_the_batch(name):
    arguments = arg_specs.make(suite.TREE)
    out, logs = suite.run(suite.TREE, suite.INTERPRETED[name], arguments)
    of_rows = ("query", "keys", "values", "page_table", "lengths", "positions", "words")
    # Elsewhere in the batch, beside rows of other lengths and numbers.
    order = np.array([2, 0, 1])
    moved = arguments | {k: arguments[k][order] for k in of_rows}
    moved["lengths"] = moved["lengths"] * [1, 0, 1]
    moved["query"][1] = np.nan
    again, again_logs = suite.run(suite.TREE, suite.INTERPRETED[name], moved)
    for now, before in ((0, 2), (2, 1)):
        np.testing.assert_array_equal(again[now], out[before])
        np.testing.assert_array_equal(again_logs[now], logs[before])
    assert np.isnan(again[1]).all()
    # And alone.
    alone = arguments | {k: arguments[k][:1] for k in of_rows}
    np.testing.assert_array_equal(
        suite.run(suite.TREE, suite.INTERPRETED[name], alone)[0][0], out[0]
    )


@pytest.mark.parametrize("name", suite.INTERPRETED)
def test_a_node_depends_on_no_key_but_its_ancestors(name):
    """Kernels have no derivative: any change to other keys must change no bit."""
    arguments = arg_specs.make(suite.TREE)
    mask = suite.mask_of(arguments["words"], suite.TREE.num_tokens)
    out, _ = suite.run(suite.TREE, suite.INTERPRETED[name], arguments)
    for node in range(suite.TREE.num_tokens):
        changed = {k: arguments[k].copy() for k in ("keys", "values")}
        for fresh in changed.values():
            fresh[..., node] *= -30
        again, _ = suite.run(suite.TREE, suite.INTERPRETED[name], arguments | changed)
        same = (again == out).all(axis=(1, 2, 4))
        np.testing.assert_array_equal(same, ~mask[:, :, node])


def test_a_nodes_gradient_is_zero_but_for_its_ancestors_and_the_past():
    arguments = arg_specs.make(suite.TREE)
    mask = suite.mask_of(arguments["words"], suite.TREE.num_tokens)
    direction = np.random.default_rng(1).normal(size=suite.TREE.query_shape)

    def outputs(fresh):
        given = jax.tree.map(jnp.asarray, arguments) | fresh
        out, _ = api.verify_attention(
            **given, scale=suite.TREE.scale, implementation=suite.REFERENCE
        )
        return jnp.sum(out * direction, axis=(1, 2, 4))  # [B, T]

    names = ("keys", "values", "cache_keys", "cache_values")
    given = {name: jnp.asarray(arguments[name]) for name in names}
    slopes = suite.quick_jit(jax.jacrev(outputs))(given)
    for name in names[:2]:
        size = np.abs(slopes[name]).max(axis=(3, 4))  # [B, T, B, T]
        for b, other in np.ndindex(suite.TREE.batch, suite.TREE.batch):
            seen = mask[b] if b == other else np.zeros_like(mask[b])
            assert (size[b, :, other][~seen] == 0).all()
            # A node that sees itself alone weighs itself 1, whatever its key.
            few = (mask[b].sum(axis=1) + suite.TREE.lengths[b]) == 1
            if name == "values" or not few.any():
                assert (size[b, :, other][seen] > 0).all()
    for name in names[2:]:
        readable = np.isfinite(arguments[name])
        slope = np.asarray(slopes[name])
        assert (slope[:, :, ~readable] == 0).all()
        assert (np.abs(slope).max(axis=(0, 1))[readable] > 0).all()


@pytest.mark.parametrize("name", suite.INTERPRETED)
def test_heads_are_spread_over_devices(name):
    mesh = sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    arguments = arg_specs.make(suite.TREE)
    spread = api.Implementation(name, interpret=True, mesh=mesh)
    out, logs = suite.run(suite.TREE, spread, arguments)
    whole, whole_logs = suite.run(suite.TREE, suite.INTERPRETED[name], arguments)
    np.testing.assert_array_equal(out, whole)
    np.testing.assert_array_equal(logs, whole_logs)
    assert suite.run(suite.TREE, spread, arguments, log=False)[1] is None


def test_the_suite_reaches_every_way_to_cut_a_call():
    plans = [
        [
            backend.plan(s.query_shape, s.dtype, s.page_size, s.max_pages)
            for s in arg_specs.SUITE
        ]
        for backend in (tpu_plan, pallas_gpu)
    ]
    of_tpu, of_gpu = plans
    for field in ("num_blocks", "num_tiles", "turned", "packing", "pages_at_once"):
        assert len({getattr(plan, field) for plan in of_tpu}) > 1, field
    for field in ("num_blocks", "num_stretches", "tile", "tiles_at_once"):
        assert len({getattr(plan, field) for plan in of_gpu}) > 1, field


def test_a_rows_stretches_do_not_depend_on_the_batch():
    spec = arg_specs.by_name("verify_b32_8k_w16")
    plans = {
        pallas_gpu.plan((batch, *spec.query_shape[1:]), spec.dtype, 128, 65)
        for batch in (1, 3, 256)
    }
    assert len(plans) == 1


def with_bit(words, node, bit, value):
    words = words.copy()
    words[0, node, bit // 32] &= ~np.uint32(1 << bit % 32)
    words[0, node, bit // 32] |= np.uint32(value << bit % 32)
    return words


def at(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(query=a["query"][0]), "query has shape"),
        (lambda a: dict(keys=a["keys"][:, :1]), "keys has shape .* ask for"),
        (lambda a: dict(words=a["words"][..., :0]), "words has shape"),
        (lambda a: dict(lengths=a["lengths"].astype(np.float32)), "lengths is float32"),
        (lambda a: dict(query=a["query"].astype(np.float16)), "keys is float32"),
        (lambda a: dict(layer=2), "layer=2 of 2"),
        (lambda a: dict(lengths=at(a["lengths"], 1, 999)), r"lengths\[1\]=999 .* 64"),
        (lambda a: dict(page_table=at(a["page_table"], (0, 1), 77)), r"\[0, 1\]=77"),
        (lambda a: dict(positions=a["positions"] - 1), r"positions\[0\] .* below"),
        (lambda a: dict(words=with_bit(a["words"], 3, 3, 0)), "node 3 itself"),
        (lambda a: dict(words=with_bit(a["words"], 3, 5, 1)), "behind node 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = arg_specs.make(suite.TREE)
    with pytest.raises(ValueError, match=message):
        api.verify_attention(
            **arguments | change(arguments), scale=1.0, implementation=suite.REFERENCE
        )


def test_what_a_kernel_cannot_do_is_refused_by_name():
    def shapes(spec, num_tokens=None):
        spec = dataclasses.replace(spec, num_tokens=num_tokens or spec.num_tokens)
        made = arg_specs.shapes(spec)
        return jax.eval_shape(
            lambda a: api.verify_attention(
                **a, scale=1.0, implementation=api.Implementation("mosaic_tpu")
            ),
            made,
        )

    with pytest.raises(NotImplementedError, match="give them with packing=8"):
        shapes(suite.TREE)
    prefill = arg_specs.by_name("prefill_b4_8k_t1024")
    with pytest.raises(NotImplementedError, match="rollout.prefill_chunk"):
        shapes(prefill, 2**15)
    with pytest.raises(ValueError, match="more than 128: verify fewer"):
        shapes(arg_specs.by_name("verify_b4_32k_w64"), 160)
    with pytest.raises(ValueError, match="'cuda' is not known"):
        api.Implementation("cuda")


def test_names_of_arguments_are_unique_and_known():
    names = [spec.name for spec in (*arg_specs.SUITE, *arg_specs.LARGE)]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="no arguments are called 'x': use one of dec"):
        arg_specs.by_name("x")
