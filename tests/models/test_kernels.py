"""Which kernels a program gets, and which choices are refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import kernels
from tlt_jax.runtime import sharding

RULES = sharding.ShardingRules()


def mesh_of(platform=None, kind="TPU v5", count=1):
    """One CPU device, or what stands for devices of another platform."""
    if platform is None:
        device = jax.devices()[0]
        return jax.sharding.Mesh(np.array([device]), ("data",))
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.array([device] * count))


def choose(attention, mesh=None, cpu_kernels="xla", **options):
    mesh = mesh or mesh_of()
    return kernels.choose(cpu_kernels, attention, mesh, RULES, jnp.float32, **options)


def test_on_cpus_the_walk_over_pages_unless_a_kernel_is_interpreted():
    for asked in ("auto", "portable"):
        assert choose(asked) == kernels.PORTABLE
    assert choose("auto", checked=True) == kernels.Kernels(checked=True)
    chosen = choose("mosaic_tpu_interpreted").attention
    assert (chosen.name, chosen.interpret) == ("mosaic_tpu", True)
    assert choose("triton_gpu_interpreted").attention.name == "triton_gpu"


@pytest.mark.parametrize(
    ("platform", "name"),
    [("tpu", "mosaic_tpu"), ("gpu", "triton_gpu"), ("cuda", "triton_gpu")],
)
def test_a_platform_has_its_kernel(platform, name):
    mesh, two = mesh_of(platform), mesh_of(platform, count=2)
    for asked in ("auto", name):
        chosen = choose(asked, mesh).attention
        # Programs of one device are the same for each.
        assert (chosen.name, chosen.interpret, chosen.mesh) == (name, False, None)
        assert choose(asked, two).attention.mesh == two
        assert choose(asked, mesh).split is None
        assert choose(asked, two).split.mesh == two
    assert choose("portable", mesh).attention is None
    assert choose("auto", mesh_of("metal")).attention is None


def test_one_gpu_has_products_of_one_column():
    def fused(mesh, cpu_kernels="auto"):
        return choose("auto", mesh, cpu_kernels).one_column

    assert fused(mesh_of("gpu")) == fused(mesh_of("cuda")) == "triton_gpu"
    assert fused(mesh_of("gpu"), "xla") is None
    assert fused(mesh_of("tpu")) is None and fused(mesh_of()) is None
    two = types.SimpleNamespace(devices=np.repeat(mesh_of("gpu").devices, 2))
    assert fused(two) is None


@pytest.mark.parametrize(
    ("asked", "platform", "message"),
    [
        ("fast", None, "attention='fast': use one of auto, portable, native_cpu, mos"),
        ("mosaic_tpu", None, "and 'mosaic_tpu_interpreted', 'triton_gpu_interpreted' "),
        ("mosaic_tpu", "gpu", "on TPU v5, where 'auto', 'portable' and 'triton_gpu' "),
        ("mosaic_tpu_interpreted", "tpu", "'auto', 'portable' and 'mosaic_tpu' work."),
        ("native_cpu", None, "'native_cpu' goes with native products, which this"),
    ],
)
def test_a_choice_that_cannot_be_had_is_refused(asked, platform, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, mesh_of(platform))


def test_pages_lie_as_the_attention_reads_them():
    assert kernels.PORTABLE.packing(16, 64) == 1
    tpu = choose("mosaic_tpu_interpreted")
    assert [tpu.packing(16, d) for d in (64, 80, 128)] == [8, 8, 1]
    assert choose("triton_gpu_interpreted").packing(16, 64) == 1
    assert kernels.NATIVE.is_native and not kernels.PORTABLE.is_native
