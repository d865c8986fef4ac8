"""Library kernels of training attention: right, chosen where they pay, compiled."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ahead_of_time, step_ahead_of_time
from tlt_jax.models import attention, flash_attention, kernels
from tlt_jax.runtime import sharding

RULES = sharding.ShardingRules()
MODEL = ahead_of_time.ARCHITECTURES["qwen2.5-7b"]
LONG = flash_attention.Lengths(prompt=1024, answer=31_744, group_size=8, row=32_768)
SPLASH = kernels.Flash("splash", interpret=True)
# Two rows of sequences of 1 to 150 columns, and padding.
COUNTS = ((3, 150, 40, 1), (100,))
WIDTH = 230


def rows():
    """A visibility of the sequences, each a prompt of one column and its answer."""
    shape = (len(COUNTS), WIDTH)
    segment, prefix = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    for b, counts in enumerate(COUNTS):
        first = 0
        for i, count in enumerate(counts):
            here = slice(first, first + count)
            prefix[b, here], segment[b, here] = 2 * i, 2 * i + 1
            segment[b, first] = 2 * i
            first += count
    return attention.Visibility(jnp.asarray(segment), jnp.asarray(prefix))


def draw(num_kv=2, group=2, head_dim=8):
    rng = np.random.default_rng(0)
    batch = len(COUNTS)
    shapes = (
        (batch, num_kv, group, WIDTH, head_dim),
        *([(batch, num_kv, head_dim, WIDTH)] * 2),
    )
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def by_flash(flash, query, keys, values):
    within = flash_attention.sequences(rows())
    return flash_attention.attend(query, keys, values, within, scale=0.4, flash=flash)


def portable(query, keys, values):
    return attention.attend_fresh(query, keys, values, rows(), scale=0.4)


def outputs_and_slopes(attend, given):
    direction = np.random.default_rng(1).normal(size=given[0].shape)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(*given):
        def total(*given):
            out = attention.finish(attend(*given))
            return jnp.sum(out.reshape(direction.shape) * direction), out

        return jax.grad(total, (0, 1, 2), has_aux=True)(*given)

    return both(*given)


def test_sequences_are_found_on_the_device():
    found = flash_attention.sequences(rows())
    assert found.starts.shape == (2, flash_attention.MOST_SEQUENCES + 1)
    assert found.starts[0, :5].tolist() == [0, 3, 153, 193, -1]
    assert found.starts[1, :2].tolist() == [0, -1]
    assert found.counts[0, :5].tolist() == [3, 150, 40, 1, -1]
    assert found.counts[1, :2].tolist() == [100, -1]
    expected = np.repeat([0, 1, 2, 3, -1], [3, 150, 40, 1, 36])
    np.testing.assert_array_equal(found.ids[0], expected)


def test_splash_equals_the_portable_form(monkeypatch):
    """Outputs and slopes; in tiles narrower than the rows, which they do not divide.

    Rows and kv heads are split over four devices.
    """
    monkeypatch.setattr(flash_attention, "_BLOCK", 128)
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    flash = dataclasses.replace(SPLASH, mesh=mesh)
    given = draw()
    slopes, out = outputs_and_slopes(functools.partial(by_flash, flash), given)
    wanted_slopes, wanted = outputs_and_slopes(portable, given)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    assert np.abs(np.asarray(wanted)).max() > 0.5
    for mine, theirs in zip(slopes, wanted_slopes, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


def mesh_of(platform, kind="a device", capability="9.0"):
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )
    return types.SimpleNamespace(devices=np.array([device]), size=1)


def choose(asked, mesh, model=MODEL, dtype="bfloat16", lengths=LONG):
    return flash_attention.choose(asked, model, dtype, mesh, RULES, lengths)


@pytest.mark.parametrize(
    ("platform", "name"), [("tpu", "splash"), ("gpu", "cudnn"), ("cuda", "cudnn")]
)
def test_auto_takes_the_devices_kernel_where_it_can_and_pays(platform, name):
    mesh = mesh_of(platform)
    windowed = dataclasses.replace(
        MODEL, sliding_window=64, windowed_layers=(True,) * MODEL.num_layers
    )
    for asked in ("auto", name):
        chosen = choose(asked, mesh)
        assert (chosen.name, chosen.interpret, chosen.mesh) == (name, False, mesh)
    assert choose("portable", mesh) is None
    assert choose("auto", mesh, dtype="float32") is None
    assert choose("auto", mesh, model=windowed) is None
    short = dataclasses.replace(LONG, prompt=8192, answer=64, group_size=64)
    assert choose("auto", mesh, lengths=short) is None
    # By name, whatever it costs.
    assert choose(name, mesh, lengths=short).name == name
    assert choose("auto", mesh_of("cpu")) is None
    assert choose("auto", mesh_of("gpu", capability="8.0")) is None


@pytest.mark.parametrize(
    ("asked", "mesh", "changes", "message"),
    [
        ("fast", mesh_of("tpu"), {}, "use one of auto, portable, splash, cudnn"),
        ("splash", mesh_of("gpu", "H200"), {}, "'splash' is for TPUs, and this is H2"),
        ("cudnn", mesh_of("cpu", "cpu"), {}, "is for NVIDIA GPUs, and this is cpu: us"),
        (
            "splash",
            mesh_of("tpu"),
            {"dtype": "float32"},
            "bfloat16, and precision is f",
        ),
        (
            *("cudnn", mesh_of("gpu")),
            {"model": dataclasses.replace(MODEL, head_dim=256)},
            "at most 128 in steps of 8, and this model's is 256: use 'auto' or 'port",
        ),
        ("cudnn", mesh_of("gpu", "A100", "8.0"), {}, "Hopper .* and this is A100"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(asked, mesh, changes, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, mesh, **changes)


def test_prompts_are_repeated_where_that_is_cheaper():
    def repeats(**changes):
        lengths = dataclasses.replace(LONG, **changes)
        return flash_attention.repeats_prompts(MODEL, lengths)

    assert repeats()
    assert repeats(answer=8192)
    # Ten answers share a long prompt in one row: a copy for each is ten times as much.
    assert not repeats(prompt=16_384, answer=512, group_size=32)
    # In a short row scores are few.
    assert not repeats(prompt=1024, answer=256, group_size=8, row=2048)


@pytest.fixture
def no_cache():
    ahead_of_time.use_compilation_cache(False)
    yield
    ahead_of_time.use_compilation_cache(True)


LENGTH = 4096


def compiled_text(name, device, head_dim=128):
    """Forward and backward pass of a row for a device that is not there."""
    mesh = sharding.make_mesh(1, 1, 1, devices=[device])
    flash = kernels.Flash(name)

    def shape(*sizes, dtype=jnp.bfloat16):
        where = sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    def loss(given, segment, prefix):
        within = flash_attention.sequences(attention.Visibility(segment, prefix))
        part = flash_attention.attend(*given, within, scale=0.1, flash=flash)
        return jnp.sum(attention.finish(part) ** 2)

    columns = shape(1, 4, head_dim, LENGTH)
    given = (shape(1, 4, 7, LENGTH, head_dim), columns, columns)
    ids = shape(1, LENGTH, dtype=jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(jax.grad(loss)).lower(given, ids, ids).compile().as_text()


def tiles(text):
    """Arrays with two axes as long as a row, which no program may have."""
    return set(re.findall(rf"\w+\[[\d,]*{LENGTH},{LENGTH}\]", text))


@pytest.mark.tpu_compile
@pytest.mark.parametrize("head_dim", [128, 64])
def test_splash_compiles_for_tpus_and_keeps_no_scores(no_cache, head_dim):
    device = ahead_of_time.described_devices("v5e:2x2")[0]
    text = compiled_text("splash", device, head_dim)
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not tiles(text)


@pytest.mark.cuda_compile
@pytest.mark.timeout(600)
def test_cudnn_compiles_for_an_h200_and_keeps_no_scores(no_cache):
    with ahead_of_time.cudnn_of_described():
        text = compiled_text("cudnn", step_ahead_of_time.described("h200")[0])
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        assert text.count(f'custom_call_target="__cudnn${name}"') == 1, name
    assert not tiles(text)
