"""Engine weights against the learner's: equal, apart, on the engine's devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.rl.workers import weight_sync
from tlt_jax.runtime import programs, sharding

MODEL = model_config.ModelConfig(
    "qwen3", 64, 3, 32, 48, 4, 2, 8, False, qkv_bias=True, qk_norm=True
)


def place(mesh, seed=0, model=MODEL):
    params = model_params.init(model, jax.random.key(seed))
    axes = model_params.logical_axes(model)
    rules = sharding.ShardingRules()
    return jax.device_put(params, sharding.tree_shardings(mesh, rules, axes))


def addresses(tree):
    return {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    }


@pytest.fixture
def pool():
    pool = programs.ProgramPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (2, 2, 2), (2, 4, 1)])
def test_engine_gets_the_learners_weights_on_its_devices(pool, shape, dtype):
    mesh = sharding.make_mesh(*shape)
    (target,) = weight_sync.engine_meshes(mesh)
    assert dict(target.shape) == {"data": 1, "fsdp": 1, "tensor": shape[2]}
    assert list(target.devices.flat) == list(mesh.devices[0, 0])
    params = place(mesh)
    sync = weight_sync.WeightSync(
        MODEL, source=mesh, targets=[target], pool=pool, dtype=dtype
    )
    (got,), version = sync.sync(params)
    assert version == sync.version == 1
    expected = model_params.unstack(jax.device_get(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(jnp.asarray(b, dtype), np.float32)
        ),
        got,
        expected,
    )
    for leaf in jax.tree.leaves(got):
        assert leaf.dtype == dtype
        assert leaf.sharding.device_set == set(target.devices.flat)
    # Tensor-parallel weights are split in the engine as well.
    assert got.layers[0].qkv.addressable_shards[0].data.shape[0] == 2 // shape[2]
    assert got.embed.addressable_shards[0].data.shape == (64 // shape[2], 32)


def test_every_worker_gets_a_copy_on_devices_of_its_own(pool):
    mesh = sharding.make_mesh(2, 2, 2)
    targets = weight_sync.engine_meshes(mesh, 2)
    held = [set(target.devices.flat) for target in targets]
    assert [len(devices) for devices in held] == [2, 2] and not held[0] & held[1]
    params = place(mesh)
    sync = weight_sync.WeightSync(MODEL, source=mesh, targets=targets, pool=pool)
    copies, _ = sync.sync(params)
    expected = model_params.unstack(jax.device_get(params))
    for copy, devices in zip(copies, held, strict=True):
        jax.tree.map(np.testing.assert_array_equal, copy, expected)
        assert all(x.sharding.device_set == devices for x in jax.tree.leaves(copy))
    with pytest.raises(ValueError, match="workers.num=5 needs as many places"):
        weight_sync.engine_meshes(mesh, 5)


@pytest.mark.parametrize("spans_processes", [False, True])
@pytest.mark.parametrize("shape,tensor", [((1, 2, 2), 1), ((1, 4, 1), 2)])
def test_engines_may_be_split_otherwise_than_the_learner(
    pool, monkeypatch, shape, tensor, spans_processes
):
    """Also as if other processes had the rest: each takes what its devices hold."""
    mesh = sharding.make_mesh(*shape)
    monkeypatch.setattr(sharding, "spans_processes", lambda mesh: spans_processes)
    targets = weight_sync.engine_meshes(mesh, 2, tensor)
    assert [target.devices.shape for target in targets] == [(1, 1, tensor)] * 2
    sync = weight_sync.WeightSync(
        MODEL, source=mesh, targets=targets, pool=pool, dtype=jnp.bfloat16
    )
    params = place(mesh)
    expected = model_params.unstack(jax.device_get(params))
    for copy, target in zip(sync.sync(params)[0], targets, strict=True):
        assert copy.embed.sharding.device_set == set(target.devices.flat)
        assert copy.embed.addressable_shards[0].data.shape == (64 // tensor, 32)
        jax.tree.map(
            lambda got, exact: np.testing.assert_array_equal(
                got, exact.astype(jnp.bfloat16)
            ),
            copy,
            expected,
        )


@pytest.mark.parametrize(
    "shape,num_workers,tensor,expert",
    [
        ((1, 8, 1), 8, 1, 1),
        ((1, 8, 1), 1, 1, 1),
        ((1, 4, 2), 4, 2, 1),
        ((2, 2, 2), 8, 1, 1),
        ((1, 4, 2), 2, 4, 1),
        ((1, 8, 1), 1, 8, 1),
        ((1, 4, 1), 8, 1, 2),
    ],
)
def test_no_byte_of_a_transfer_passes_through_the_host(
    pool, shape, num_workers, tensor, expert
):
    """However learner and engines are split: they have devices in common."""
    mesh = sharding.make_mesh(*shape, expert=expert)
    model = dataclasses.replace(MODEL, num_heads=8, num_kv_heads=8)
    targets = weight_sync.engine_meshes(mesh, num_workers, tensor)
    params = place(mesh, model=model)
    sync = weight_sync.WeightSync(model, source=mesh, targets=targets, pool=pool)
    sync.sync(params)  # The numbers of layers stay where they are.
    with jax.transfer_guard("disallow_explicit"):
        copies, _ = sync.sync(params)
    for copy in copies:
        np.testing.assert_array_equal(copy.embed, params.embed)
        np.testing.assert_array_equal(copy.layers[2].down, params.layers.down[2])


def test_places_of_engines_that_cannot_be_had_are_refused():
    mesh = sharding.make_mesh(1, 2, 3, devices=jax.devices()[:6])
    with pytest.raises(ValueError, match="rollout.tensor=4 does not divide the mesh's"):
        weight_sync.engine_meshes(mesh, 1, 4)
    with pytest.raises(ValueError, match="workers.num=4 needs .* 2 devices .* are 3"):
        weight_sync.engine_meshes(mesh, 4, 2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_learner_may_give_its_buffers_up(pool, shape):
    """An update donates the masters: the engine must not read their memory."""
    mesh = sharding.make_mesh(*shape)
    params = place(mesh)
    sync = weight_sync.WeightSync(
        MODEL, source=mesh, targets=weight_sync.engine_meshes(mesh), pool=pool
    )
    (got,), _ = sync.sync(params)
    assert not addresses(got) & addresses(params)
    before = jax.tree.map(np.array, got)
    zeroed = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)
    jax.block_until_ready(zeroed(params))
    jax.tree.map(np.testing.assert_array_equal, got, before)


def test_versions_count_and_nothing_recompiles(pool):
    mesh = sharding.make_mesh(1, 2, 1)
    sync = weight_sync.WeightSync(
        MODEL, source=mesh, targets=weight_sync.engine_meshes(mesh), pool=pool
    )
    sync.restore({"version": 8})
    for seed in range(3):
        params = place(mesh, seed)
        (got,), version = sync.sync(params)
        assert version == 8 + seed
        np.testing.assert_array_equal(got.embed, params.embed)
    # A layer, whichever, and the rest.
    assert pool.stats.num_compiled == 2
    # A resumed run gives the engines the same weights again, as the same version.
    assert sync.state() == {"version": 10}


def test_a_run_resumes_at_its_version_whatever_its_last_step_taught(pool):
    """A step without signal, of DAPO's, gives the engines nothing."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    targets, params = weight_sync.engine_meshes(mesh), place(mesh)

    def begun(version=None):
        made = weight_sync.WeightSync(MODEL, source=mesh, targets=targets, pool=pool)
        if version is not None:
            made.restore(version)
        # The first transfer, as `Trainer.begin` makes it.
        return made, made.sync(params)[1]

    made, version = begun()
    for has_signal in (True, False, False):
        version = made.sync(params)[1] if has_signal else version
    resumed, again = begun(made.state())
    assert again == version == 2
    assert resumed.sync(params)[1] == made.sync(params)[1] == 3


def test_mesh_that_does_not_divide_is_refused_by_name(pool):
    mesh = sharding.make_mesh(1, 1, 4)
    with pytest.raises(ValueError, match="layers.qkv.*does not divide"):
        weight_sync.WeightSync(MODEL, source=mesh, targets=[mesh], pool=pool)
