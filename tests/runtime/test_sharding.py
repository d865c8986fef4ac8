"""Logical axes to mesh axes, on eight simulated devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import config as model_config
from tlt_jax.models import params as params_lib
from tlt_jax.runtime import sharding

RULES = sharding.ShardingRules()
TINY = model_config.ModelConfig(
    family="llama",
    vocab_size=64,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=True,
)


def test_mesh_shapes():
    mesh = sharding.make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert dict(sharding.make_mesh(2).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    devices = jax.devices()[2:5]
    mesh = sharding.make_mesh(1, 3, 1, devices)
    assert list(mesh.devices.flat) == devices
    assert list(sharding.make_mesh(1, 2, 1, devices).devices.flat) == devices[:2]


class Chip:
    """A device of another process, as far as a mesh looks."""

    platform = device_kind = "none"

    def __init__(self, index, process_index):
        self.id, self.process_index = index, process_index


def test_devices_of_a_process_stand_side_by_side():
    """As an engine needs them, whatever the order in which they come."""
    chips = [Chip(i, (i // 2) % 4) for i in range(16)]
    mesh = sharding.make_mesh(1, -1, 8, chips)
    processes = [[d.process_index for d in group] for group in mesh.devices[0]]
    assert processes == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
    places = sharding.regrouped(mesh, 4)
    assert places.devices.shape == (1, 4, 4)
    assert list(places.devices.flat) == list(mesh.devices.flat)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "at most one"),
        ((0, 1, 1), "at least 1"),
        ((3, -1, 1), "8 devices do not divide into groups of 3"),
        ((4, 4, 1), "needs 16 devices, but there are 8"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_weights_split_by_rules():
    mesh = sharding.make_mesh(2, 2, 2)
    shardings = sharding.tree_shardings(
        mesh, RULES, params_lib.logical_axes(TINY), params_lib.abstract(TINY)
    )
    specs = jax.tree.map(lambda s: tuple(s.spec), shardings)
    assert specs.embed == ("tensor", "fsdp")
    assert specs.layers.router is None
    assert specs.layers.qkv == (None, "tensor", None, None, "fsdp")
    assert specs.layers.gate_up == (None, None, "tensor", "fsdp")
    assert specs.layers.down == (None, "fsdp", "tensor")
    assert specs.final_norm == (None,)
    params = jax.device_put(params_lib.init(TINY, jax.random.key(0)), shardings)
    assert params.layers.down.addressable_shards[0].data.shape == (2, 8, 12)


def test_experts_have_an_axis_of_their_own():
    """Other weights are split over it as over `fsdp`; batches as well."""
    mesh = sharding.make_mesh(1, 2, 2, expert=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    experts = model_config.Experts(num=4, per_token=2, d_ff=8)
    cfg = dataclasses.replace(TINY, family="qwen3_moe", experts=experts)
    axes, shapes = params_lib.logical_axes(cfg), params_lib.abstract(cfg)
    specs = jax.tree.map(
        lambda s: tuple(s.spec), sharding.tree_shardings(mesh, RULES, axes, shapes)
    )
    assert specs.embed == ("tensor", ("fsdp", "expert"))
    assert specs.layers.gate_up == (None, "expert", None, "tensor", "fsdp")
    assert specs.layers.down == (None, "expert", "fsdp", "tensor")
    assert specs.layers.router == (None, None, ("fsdp", "expert"))
    spec = sharding.named(mesh, RULES, ("batch",), (16,)).spec
    assert tuple(spec) == (("data", "fsdp", "expert"),)
    few = model_config.Experts(num=3, per_token=2, d_ff=8)
    cfg = dataclasses.replace(cfg, experts=few)
    axes, shapes = params_lib.logical_axes(cfg), params_lib.abstract(cfg)
    with pytest.raises(ValueError, match=r"gate_up: axis 1 \(expert\) of shape \(2, 3"):
        sharding.tree_shardings(mesh, RULES, axes, shapes)


def test_batch_splits_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 4, 1)
    spec = sharding.named(mesh, RULES, ("batch", None), (16, 5)).spec
    assert tuple(spec) == (("data", "fsdp"), None)
    array = jax.device_put(
        jnp.arange(80).reshape(16, 5), sharding.named(mesh, RULES, ("batch",))
    )
    assert array.addressable_shards[3].data.shape == (2, 5)


def test_axis_that_does_not_divide_is_an_error_or_replicated():
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(ValueError, match=r"axis 0 \(kv_heads\) of shape \(2, 7\)"):
        sharding.named(mesh, RULES, ("kv_heads", None), (2, 7))
    spec = sharding.named(mesh, RULES, ("kv_heads", None), (2, 7), replicate=True).spec
    assert tuple(spec) == (None, None)
    with pytest.raises(ValueError, match=r"\.layers\.qkv: axis 1 \(kv_heads\)"):
        sharding.tree_shardings(
            mesh, RULES, params_lib.logical_axes(TINY), params_lib.abstract(TINY)
        )


def test_one_mesh_axis_serves_one_array_axis():
    mesh = sharding.make_mesh(1, 4, 2)
    spec = sharding.named(mesh, RULES, ("batch", "embed", "mlp", "vocab")).spec
    assert tuple(spec) == (("data", "fsdp"), None, "tensor", None)


def test_unknown_names_are_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="logical axis 'embd' has no rule: use embed"):
        sharding.named(mesh, RULES, ("embd",))
    with pytest.raises(ValueError, match="names no mesh axis 'model'"):
        sharding.ShardingRules(mlp=("model",))


def test_sharded_computation_equals_single_device():
    params = params_lib.init(TINY, jax.random.key(0))
    mesh = sharding.make_mesh(2, 2, 2)
    shardings = sharding.tree_shardings(mesh, RULES, params_lib.logical_axes(TINY))
    x_DB = jax.random.normal(jax.random.key(1), (16, 8))

    def program(p, x):
        gate, up = jnp.einsum("cfd,db->cfb", p.layers.gate_up[0], x)
        return p.embed @ (p.layers.down[0] @ (jax.nn.silu(gate) * up))

    out = jax.jit(program)(
        jax.device_put(params, shardings),
        jax.device_put(x_DB, sharding.named(mesh, RULES, (None, "batch"), x_DB.shape)),
    )
    np.testing.assert_allclose(out, program(params, x_DB), rtol=1e-5, atol=1e-6)
    assert sharding.replicated(mesh).is_fully_replicated
