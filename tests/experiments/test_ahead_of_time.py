"""The large recipes' programs: shardings divide, they lower, the table is theirs."""

import csv
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from configs import grpo
from experiments import ahead_of_time, recipe_programs
from experiments.lab import experiment, tables
from tlt_jax import config
from tlt_jax.models import params as model_params
from tlt_jax.runtime import sharding

MESH_AXES = sharding.MESH_AXES
TABLE = experiment.RESULTS_DIR / "cpu" / "ahead_of_time.csv"


def run_of(name, **changes):
    recipe = grpo.get_config(name)
    recipe.update_from_flattened_dict(changes)
    return config.load(recipe)


@pytest.mark.parametrize(
    ("name", "num_weights"),
    [  # As their model cards' files add up.
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("ds-r1-distill-qwen-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-3.3-70b", 70_553_706_496),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_architectures_have_as_many_weights_as_published(name, num_weights):
    assert model_params.count(ahead_of_time.ARCHITECTURES[name]) == num_weights


def mesh_of(run):
    """Sizes and names of the mesh's axes; only mixtures have one for experts."""
    mesh = run.mesh
    if mesh.expert == 1:
        return (mesh.data, mesh.fsdp, mesh.tensor), MESH_AXES
    sizes = mesh.data, mesh.fsdp, mesh.expert, mesh.tensor
    return sizes, ("data", "fsdp", "expert", "tensor")


@pytest.mark.parametrize("name", grpo.VARIANTS)
def test_weights_and_cache_divide_over_the_recipes_mesh(name):
    run, model = run_of(name), ahead_of_time.architecture_of(name)
    sizes, axes_of = mesh_of(run)
    chip, _, shape = ahead_of_time.SLICES[name].partition(":")
    assert math.prod(map(int, shape.split("x"))) == math.prod(sizes)
    assert chip in ahead_of_time.HBM_BYTES
    axes = model_params.logical_axes(model)
    rules = sharding.ShardingRules()
    # A single device holds all.
    for dims, names in ((sizes, axes_of), ((1, 1, run.mesh.tensor), MESH_AXES)):
        mesh = AbstractMesh(dims, names)
        shapes = model_params.abstract(model)
        placed = sharding.tree_shardings(mesh, rules, axes, shapes)
        split = [
            math.prod(leaf.shape) // math.prod(where.shard_shape(leaf.shape))
            for leaf, where in zip(
                jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True
            )
            if leaf.size > 2**24
        ]
        assert min(split) == math.prod(dims)  # no large weight is held whole
    assert model.num_kv_heads % run.mesh.tensor == 0
    # An engine's devices are one process's; a host of v5p has four, others eight.
    per_host = min(4 if chip == "v5p" else 8, math.prod(sizes))
    assert (run.rollout.tensor or run.mesh.tensor) * run.workers.num == per_host
    num_engines = math.prod(sizes) // per_host * run.workers.num
    responses = run.rollout.prompts_per_step * run.rollout.group_size
    turns = responses // (num_engines * run.rollout.max_batch)
    # All responses of a step are decoded at once, or on few devices in some turns.
    assert turns == 1 if math.prod(sizes) >= 64 else 4 <= turns <= 8
    assert run.cache.page_size % 128 == 0


def cut(name, devices):
    """A recipe with two layers, as wide and long as ever, on 4 or 8 devices."""
    model = dataclasses.replace(ahead_of_time.ARCHITECTURES[name], num_layers=2)
    sizes = {"mesh.fsdp": len(devices) // 4, "mesh.tensor": 4}
    return recipe_programs.Recipe(model, run_of(name, **sizes), devices)


@functools.cache
def lowered():
    recipe = cut("llama-3.3-70b", jax.devices())
    return {
        program.name: (program, program.lower())
        for program in recipe.programs()
        if program.name in ("accumulate", "apply", "sync", "decode_16")
    }


def test_a_cut_of_a_recipe_lowers_at_full_length():
    rows_of_32k = "2x32768xi32"
    text = lowered()["accumulate"][1].as_text()
    assert rows_of_32k in text
    # Heads over tensor, features over fsdp, as the default rules say.
    assert '{"tensor"}, {}, {}, {"fsdp"}' in text
    # What is kept of every layer is split by columns, too.
    assert '[{}, {"fsdp"}, {"tensor"}]' in text
    # The layers and the tiles of attention are loops: their number does not count.
    assert text.count("\n") < 6000
    assert '{"tensor"}' in lowered()["decode_16"][1].as_text()
    assert "tensor<16x256xi32>" in lowered()["decode_16"][1].as_text()


def test_what_a_run_holds_beside_a_program_is_added_up():
    programs = {name: program for name, (program, _) in lowered().items()}
    recipe = cut("llama-3.3-70b", jax.devices())
    params = recipe_programs.device_bytes(recipe.state.params)
    count = model_params.count(recipe.model)
    assert count * 4 / 8 <= params < count * 4 / 8 * 1.001  # norms are not split
    weights = recipe_programs.device_bytes(recipe.weights)
    assert count * 2 / 4 <= weights < count * 2 / 4 * 1.001
    moments = 2 * params + 8  # with two counters of 4 bytes
    assert programs["decode_16"].beside_bytes == 2 * params + moments
    # The cache is given up before the update.
    assert programs["apply"].beside_bytes == params + weights
    assert programs["accumulate"].beside_bytes == params + moments + weights
    assert programs["sync"].beside_bytes == 2 * (params + weights) + moments


def test_what_a_drafter_reads_is_split_as_the_keys_are():
    """Whole on each device it would take twice what keys and values do."""
    changes = {"specdec.mode": "tlt", "mesh.fsdp": 2, "mesh.tensor": 4}
    run, model = run_of("qwen2.5-7b", **changes), ahead_of_time.ARCHITECTURES
    recipe = recipe_programs.Recipe(model["qwen2.5-7b"], run, jax.devices())
    target = recipe.engine.programs.abstract_caches.target
    features = recipe_programs.device_bytes(target.features)
    # Of 64 rows of 32K and a page each: three layers' and the last of D, on four.
    positions = target.num_pages * 128
    assert features == positions * 4 * 3584 * 2 // 4 < 15 * 2**30
    kept = recipe_programs.device_bytes((target.keys, target.values))
    assert kept == positions * 28 * 4 * 2 * 128 * 2 // 4
    names = [program.name for program in recipe.rollouts()]
    assert names == ["tlt_prefill_4", "tlt_decode_64", "tlt_speculate_16", "tlt_fill_4"]


def test_what_trains_the_drafter_stands_beside_a_waiting_worker():
    """On its first device, which holds its part of the engine and all that learns."""
    model = dataclasses.replace(
        ahead_of_time.ARCHITECTURES["qwen2.5-7b"],
        num_layers=4,
        vocab_size=4096,
        eos_ids=(1,),
        d_model=256,
        d_ff=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    )
    changes = {
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
        "specdec.mode": "tlt",
        "cache.num_pages": 300,
        "drafter.draft_vocab_size": 1024,
        "drafter.features": "layers",
        "drafter.feature_layers": (0, 1, 2),
        "adaptation.row_tokens": 512,
        "adaptation.row_bases": 128,
    }
    recipe = recipe_programs.Recipe(
        model, run_of("qwen2.5-7b", **changes), jax.devices()
    )
    programs = {program.name: program for program in recipe.drafter_training()}
    size = recipe_programs.device_bytes
    # Joining three features, and feature and embedding; attention; a gated layer;
    # biases and norms.
    num = (3 + 2 + 3) * 256**2 + 3 * 256 * 512 + 512 + 3 * 256
    state, grads = 3 * 4 * num + 3 * 4, 4 * num
    batch = 512 * (3 * 4 + 4 * 256 * 2) + 128 * (4 + 1 + 8)
    head = 1024 * 256 * 2
    target = 4096 * 256 * 2 + head + 1024 * 4
    sums, seen = 5 * 7 * 4, 512 * (256 + 2 * 2 * 64) * 2
    # Keys and values of the layers and of the drafter's, and features, on two devices.
    pages = 300 * 128 * 2 * ((4 + 1) * 2 * 2 * 64 + 4 * 256) // 2
    policy = 2 * size(recipe.state.params) + size(recipe.state.opt_state)
    copies = 2 * (2 * num + 1024 * 4)
    waiting = policy + size(recipe.weights) + pages + head + copies
    before = waiting + state + batch + target
    after = before + grads + sums + 2 * seen
    assert {name: (p.beside_bytes + p.given_bytes) for name, p in programs.items()} == {
        "drafter_begin": before,
        **dict.fromkeys(("drafter_add", "drafter_close", "drafter_update"), after),
    }
    read = 4 * num + batch + target
    assert {name: p.given_bytes for name, p in programs.items()} == {
        "drafter_begin": read,
        "drafter_add": read + grads + sums + 2 * seen,
        "drafter_close": read + grads + seen,
        "drafter_update": state + grads + sums + batch,
    }
    # A row of 512 with features, whole, is what the first reads.
    text = programs["drafter_begin"].lower().as_text()
    assert "tensor<1x512x768xbf16>" in text and "1x2048x768" not in text


def test_a_row_of_the_same_program_is_not_compiled_again():
    asked = []

    class Lowered:
        def as_text(self):
            return "a program"

        def compile(self):
            asked.append(1)
            raise jax.errors.JaxRuntimeError("Ran out")

    program = recipe_programs.Program("one", Lowered, 10)
    refused = ahead_of_time.measure(program, 100.0, None, "v5p:2x2x1")
    assert refused["refused"] == "Ran out" and len(asked) == 1
    columns = ("argument_bytes", "output_bytes", "temp_bytes", "code_bytes")
    known = {
        **{name: 20 for name in columns},
        **{"lowered_digest": refused["lowered_digest"], "commit": "c0ffee"},
    }
    row = ahead_of_time.measure(program, 100.0, known, "v5p:2x2x1")
    assert (row["total_bytes"], row["fits"], row["commit"]) == (90, True, "c0ffee")
    # What is given and not read is held beside.
    given = dataclasses.replace(program, given_bytes=31)
    assert ahead_of_time.measure(given, 100.0, known, "v5p:2x2x1")["fits"] is False
    assert len(asked) == 1
    # For other devices it is another.
    assert ahead_of_time.measure(program, 100.0, known, "v5e:2x4")["refused"]
    assert len(asked) == 2


def test_a_program_is_compiled_and_judged():
    def lower():
        x = jax.ShapeDtypeStruct((1000,), jnp.float32)
        return jax.jit(lambda x: jnp.sin(x) + 1).lower(x)

    program = recipe_programs.Program("sine", lower, beside_bytes=10_000)
    row = ahead_of_time.measure(program, hbm_bytes=20_000)
    assert row["argument_bytes"] == row["output_bytes"] == 4000
    assert row["total_bytes"] >= 18_000
    assert row["fits"] == (row["total_bytes"] <= 20_000)
    assert not ahead_of_time.measure(program, hbm_bytes=17_999)["fits"]
    assert row["num_all_reduce"] == 0


def test_a_program_that_the_compiler_refuses_is_a_row():
    class Refused:
        def as_text(self):
            return ""

        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED\nUsed 120.0G of 95.7G hbm, exceeds by 24.3G\nmore"
            )

    program = recipe_programs.Program("large", Refused, 0)
    row = ahead_of_time.measure(program, 1.0)
    assert (row["fits"], row["refused"]) == (
        False,
        "Used 120.0G of 95.7G hbm, exceeds by 24.3G",
    )


def test_collectives_are_counted_once_each():
    text = """
  %all-reduce.22 = bf16[8,64]{0,1:T(8,128)} all-reduce(%fusion.260), channel_id=2
  %done = f32[2] all-gather-done(%start)
  ROOT %start = (f32[1], f32[2]{0}) all-gather-start(%x), dimensions={0}
  %y = (f32[64]{0}, f32[64]{0}) all-reduce(%a, %b), channel_id=10
  %fusion.3 = f32[8]{0} fusion(%all-reduce.22), calls=%all-reduce-scatter
"""
    assert ahead_of_time.collectives(text) == {"all-reduce": 2, "all-gather": 1}


def test_rows_of_earlier_calls_are_kept():
    def row(model, program, fits):
        return {"model": model, "program": program, "fits": fits}

    old = [row("qwen2.5-7b", "apply", 1), row("qwen2.5-32b", "sync", 2)]
    new = [row("llama-3.3-70b", "apply", 3), row("qwen2.5-7b", "apply", 4)]
    assert [r["fits"] for r in ahead_of_time.merged(old, new)] == [4, 2, 3]


def test_a_stopped_call_has_lost_nothing_and_the_next_goes_on(tmp_path, monkeypatch):
    seen = []

    def run_model(name, wanted, known):
        for program in ("apply", "sync"):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append((name, program, known.get(program, {}).get("commit")))
            row = {"model": name, "program": program, "total_bytes": len(seen)}
            yield row | {"commit": known.get(program, {}).get("commit")}

    monkeypatch.setattr(ahead_of_time, "run_model", run_model)
    monkeypatch.setattr(ahead_of_time, "without_devices", lambda: None)
    first, second = "qwen2.5-7b", "qwen2.5-32b"
    path, record = tmp_path / "ahead_of_time.csv", tmp_path / "ahead_of_time.json"
    rows = [
        {"model": first, "program": "gone", "total_bytes": 0, "commit": "a"},
        {"model": second, "program": "sync", "total_bytes": 0, "commit": "b"},
    ]
    tables.write(path, rows)
    record.write_text('{"source_hash": "old", "carried": [{}], "continued": []}')
    asked = [f"--models={first},{second}", f"--out={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        ahead_of_time.main(asked)

    def left():
        return [(r["model"], r["program"], r["total_bytes"]) for r in tables.read(path)]

    # What the second model had is there, and what the first has no more is not.
    kept = [(second, "sync", 0), (second, "apply", 3)]
    assert left() == [(first, "apply", 1), (first, "sync", 2), *kept]
    assert json.loads(record.read_text())["source_hash"] == "old"
    commit = tables.read(path)[0]["commit"]
    seen[:] = [None] * 4
    ahead_of_time.main(asked)
    assert left()[2:] == [(second, "apply", 7), (second, "sync", 8)]
    assert seen[4:] == [
        *((first, "apply", commit), (first, "sync", commit)),
        *((second, "apply", commit), (second, "sync", "b")),
    ]
    told = json.loads(record.read_text())
    assert len(told["source_hash"]) == 12 and "carried" not in told
    assert [run["cells"] for run in told["continued"]] == [[first, second]] * 2


def test_without_the_compiler_the_message_has_the_command(monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ahead_of_time.NoCompilerError, match="libtpu.*pip install"):
        ahead_of_time.described_devices("v5e:2x2")


def test_the_table_is_that_of_the_recipes():
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == set(grpo.VARIANTS)
    for name in grpo.VARIANTS:
        run = run_of(name)
        its = [row for row in rows if row["model"] == name]
        size = run.rollout.max_batch
        both = name == "qwen2.5-7b@8xh200"
        # Asked for by name alone.
        more = ("tlt_prefill_4", "tlt_fill_4")
        found = [row["program"] for row in its if row["program"] not in more]
        wanted = ["accumulate", "apply", "sync", "prefill_4", f"decode_{size}"]
        # Speculation is for few rows.
        wanted += [f"tlt_decode_{size}", f"tlt_speculate_{min(16, size)}"]
        # Speculation's drafter learns beside all that.
        wanted += [f"drafter_{part}" for part in ("begin", "add", "close", "update")]
        assert sorted(found) == sorted(wanted + ["accumulate_portable"] * both)
        for row in its:
            assert row["slice"] == ahead_of_time.SLICES[name]
            assert row["mesh"] == "x".join(map(str, mesh_of(run)[0]))
            assert int(row["row_tokens"]) == run.learner.row_tokens
            if row["program"].startswith("drafter"):
                assert int(row["drafter_row_tokens"]) == run.adaptation.row_tokens
            assert int(row["max_batch"]) == run.rollout.max_batch
            assert row["remat"] == run.model.remat
            assert row["fits"] == "True", row
            # Of a GPU's memory XLA is to have 95 %, and what is freed fragments.
            if "h" in row["slice"]:
                assert int(row["total_bytes"]) < 0.94 * int(row["hbm_bytes"]), row


def test_a_row_of_32k_moves_a_twentieth_with_a_librarys_attention():
    cost = {
        row["program"]: (row["row_flops"], row["row_bytes"])
        for row in tables.read(TABLE)
        if row["model"] == "qwen2.5-7b@8xh200"
    }
    flops, num_bytes = cost["accumulate"]
    portable_flops, portable_bytes = cost["accumulate_portable"]
    assert 20 < portable_bytes / num_bytes < 25
    assert flops == pytest.approx(portable_flops, rel=0.02)


@pytest.fixture
def no_cache():
    ahead_of_time.use_compilation_cache(False)
    yield
    ahead_of_time.use_compilation_cache(True)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "name", [n for n in grpo.VARIANTS if ahead_of_time.SLICES[n].startswith("v")]
)
def test_every_host_of_a_slice_has_its_engine(name):
    run = run_of(name)
    devices = ahead_of_time.described_devices(ahead_of_time.SLICES[name])
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
    places = sharding.regrouped(mesh, run.rollout.tensor or run.mesh.tensor)
    hosts = [{chip.process_index for chip in place} for place in places.devices[0]]
    assert all(len(host) == 1 for host in hosts)
    assert len(set.union(*hosts)) == len(devices) // 4


@pytest.mark.tpu_compile
@pytest.mark.timeout(1200)
def test_a_cut_compiles_for_a_slice_that_is_not_there(no_cache):
    devices = ahead_of_time.described_devices("v5e:2x2")
    model = dataclasses.replace(
        ahead_of_time.ARCHITECTURES["qwen2.5-7b"],
        num_layers=2,
        vocab_size=4096,
        eos_ids=(1,),
        d_model=256,
        d_ff=512,
        num_heads=4,
        num_kv_heads=2,
    )
    changes = {
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "rollout.max_batch": 4,
        "rollout.max_new_tokens": 3072,
        "learner.row_tokens": 4096,
    }
    recipe = recipe_programs.Recipe(model, run_of("qwen2.5-7b", **changes), devices)
    rows = {
        program.name: ahead_of_time.measure(program, ahead_of_time.HBM_BYTES["v5e"])
        for program in recipe.programs()
        if program.name in ("accumulate", "apply", "decode_4")
    }
    assert len(rows) == 3
    assert all(row["fits"] for row in rows.values()), rows
    # What the products leave on the tensor axis is added up there.
    assert rows["accumulate"]["num_all_reduce"] and rows["decode_4"]["num_all_reduce"]
    # Given up and written in place: cache, gradient, state.
    for row in rows.values():
        assert row["output_bytes"] < row["argument_bytes"] / 10


@pytest.mark.tpu_compile
@pytest.mark.timeout(1200)
def test_decoding_does_not_copy_the_cache(no_cache):
    recipe = cut("qwen2.5-7b", ahead_of_time.described_devices("v5p:2x2x1"))
    cache = recipe_programs.device_bytes(recipe.engine.programs.abstract_caches)
    (decode,) = [p for p in recipe.programs() if p.name == "decode_64"]
    row = ahead_of_time.measure(decode, ahead_of_time.HBM_BYTES["v5p"])
    assert row["temp_bytes"] < cache / 2


@pytest.mark.tpu_compile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 64), (64, 16), (80, 32)])
def test_small_pages_are_not_copied_either(no_cache, head_dim, page_size):
    """Packed, which pages of 64 slots, the default, are for models such as SmolLM2."""
    model = dataclasses.replace(
        ahead_of_time.ARCHITECTURES["qwen2.5-7b"],
        num_layers=2,
        vocab_size=4096,
        eos_ids=(1,),
        d_model=512,
        d_ff=1024,
        num_heads=8,
        head_dim=head_dim,
    )
    changes = {
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "rollout.max_batch": 16,
        "rollout.max_new_tokens": 3072,
        "learner.row_tokens": 4096,
        "cache.page_size": page_size,
        # More than the compiler could hold in a chip's vector memory.
        "cache.num_pages": 2**18 // page_size,
    }
    devices = ahead_of_time.described_devices("v5e:2x2")
    recipe = recipe_programs.Recipe(model, run_of("qwen2.5-7b", **changes), devices)
    target = recipe.engine.programs.abstract_caches.target
    assert target.packing == 128 // page_size and target.page_size == page_size
    (decode,) = [p for p in recipe.programs() if p.name == "decode_16"]
    row = ahead_of_time.measure(decode, ahead_of_time.HBM_BYTES["v5e"])
    assert row["temp_bytes"] < recipe_programs.device_bytes(target) / 20
