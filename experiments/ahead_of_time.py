"""Compiles the large recipes for slices that are not there: do they fit?

    python -m experiments.ahead_of_time
    python -m experiments.ahead_of_time --models=qwen2.5-7b --programs=decode_64,apply

For each variant of configs/grpo.py the programs of its run are made from abstract
weights, with no file and no hub, and compiled for its devices, which are described, by
the compiler for TPUs (libtpu) or GPUs (jax's CUDA plug-in). Those called tlt_ are of
rollouts with `specdec.mode=tlt`, whose pages keep what the drafter reads and is trained
on; updates are the same. The longest rows that the recipe allows are taken. Those
called drafter_ are of a step of the drafter's training on the first device of a worker
that waits: its pages, weights and drafter stay there. The table says per device what a
program holds, what the run holds besides on the fullest device, and whether both fit
into the chip's memory. No speed is measured, but that of the compiler (`compile_cpu_s`
counts its own processor time, whatever else the machine does).

`flops` and `bytes_accessed` are the compiler's, which counts the body of a loop once
(layers of the learner, chunks of its head, tiles of attention, steps of decoding), and
so do the counts of collectives. `row_flops` and `row_bytes` are of one packed row of
the update, counted as `step_costs` does, loops as often as they run;
accumulate_portable is the same update with `learner.attention=portable`.

Every program is lowered, which takes seconds; where `lowered_digest` says that a row is
of the same program, devices and compiler, it is not compiled again, so that a call that
was stopped goes on. Rows that a call does not ask for are kept. `commit` says what each
was compiled from.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from configs import grpo
from experiments import recipe_programs
from experiments.lab import experiment, provenance, random_drafter, tables
from tlt_jax import config as config_lib
from tlt_jax.models import config as model_config
from tlt_jax.runtime import failures

GIB = 2**30
# Memory of a chip that its compiler gives to programs.
HBM_BYTES = {
    "v5e": 15.75 * GIB,
    "v5p": 95.74 * GIB,
    "v6e": 31.25 * GIB,
    "h100": 77.7 * GIB,
    "h200": 139 * GIB,
}
# Of GPUs: switches' domains, hosts in each, and devices of a host.
SLICES = {
    "qwen2.5-7b": "v5p:4x4x4",
    "qwen2.5-32b": "v5p:4x8x8",
    "ds-r1-distill-qwen-7b": "v5p:4x4x4",
    "llama-3.3-70b": "v5p:4x8x8",
    "qwen3-30b-a3b": "v5p:4x4x4",
    "qwen3-30b-a3b@64xh200": "h200:8x1x8",
    "qwen2.5-1.5b@h200": "h200:1x1x1",
    "qwen2.5-3b@h200": "h200:1x1x1",
    "qwen2.5-7b@8xh200": "h200:1x1x8",
    "qwen2.5-7b@8xh100": "h100:1x1x8",
    "qwen2.5-7b@v5p-8": "v5p:2x2x1",
    "qwen2.5-1.5b@v5e-8": "v5e:2x4",
}
# Bytes of memory, and of it in a second.
_HOPPER = {
    "h100": (84_942_979_072, 3_352_320_000_000),
    "h200": (150_754_820_096, 4_800_000_000_000),
}
# What the compiler for GPUs must know of one.
_GPU = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  clock_rate_ghz: 1.98
  device_memory_size: %d
  memory_bandwidth: %d
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
device_description_str: "NVIDIA %s"
"""
# Compiled if asked for alone: beside the cache, which all hold, verifying holds more.
_LESS = ("tlt_prefill_4", "tlt_fill_4")
# Whose update is compiled with portable attention, too, and its programs' name.
_BOTH = ("qwen2.5-7b@8xh200",)
_PORTABLE = "accumulate_portable"
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
_COLLECTIVES += ("collective-permute",)
# Columns that say what a compiler did, and of which code.
_OF_COMPILER = ("refused", "compile_s", "compile_cpu_s", "argument_bytes")
_OF_COMPILER += ("output_bytes", "temp_bytes", "peak_bytes", "code_bytes", "flops")
_OF_COMPILER += ("bytes_accessed", "commit")
_OF_COMPILER += tuple(f"num_{kind.replace('-', '_')}" for kind in _COLLECTIVES)

_QWEN = {
    "tie_embeddings": False,
    "qkv_bias": True,
    "rope_theta": 1e6,
    "max_positions": 131_072,
    "eos_ids": (151_643,),
}
_QWEN_SMALL = _QWEN | {"tie_embeddings": True}
_QWEN_7B = random_drafter.model_of(
    (152_064, 3584, 18_944, 28, 4, 128, 28), "qwen2", **_QWEN
)
# By what stands before an @ in a variant's name.
ARCHITECTURES = {
    "qwen2.5-1.5b": random_drafter.model_of(
        (151_936, 1536, 8960, 12, 2, 128, 28), "qwen2", **_QWEN_SMALL
    ),
    "qwen2.5-3b": random_drafter.model_of(
        (151_936, 2048, 11_008, 16, 2, 128, 36),
        "qwen2",
        **_QWEN_SMALL | {"max_positions": 32_768},
    ),
    "qwen2.5-7b": _QWEN_7B,
    "qwen2.5-32b": random_drafter.model_of(
        (152_064, 5120, 27_648, 40, 8, 128, 64), "qwen2", **_QWEN, rms_norm_eps=1e-5
    ),
    "ds-r1-distill-qwen-7b": dataclasses.replace(_QWEN_7B, rope_theta=1e4),
    "llama-3.3-70b": random_drafter.model_of(
        (128_256, 8192, 28_672, 64, 8, 128, 80),
        "llama",
        tie_embeddings=False,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=model_config.RopeScaling(
            "llama3", 8.0, original_max_positions=8192
        ),
        max_positions=131_072,
        eos_ids=(128_001, 128_008, 128_009),
    ),
    "qwen3-30b-a3b": random_drafter.model_of(
        (151_936, 2048, 6144, 32, 4, 128, 48),
        "qwen3_moe",
        tie_embeddings=False,
        qk_norm=True,
        rope_theta=1e6,
        max_positions=40_960,
        eos_ids=(151_645, 151_643),
        experts=model_config.Experts(num=128, per_token=8, d_ff=768),
    ),
}


class NoCompilerError(failures.UserError):
    """The compiler for the chips is not installed."""


def described_devices(topology: str) -> Sequence[Any]:
    """Returns devices that need not exist, `v5p:4x4x4` or `h200:8x1x8`.

    Raises:
      NoCompilerError: their compiler is missing; the message has the command that
        installs the release that this jax was made with.
    """
    chip, _, shape = topology.partition(":")
    if chip in _HOPPER:
        return _described_gpus(chip, shape)
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompilerError(
            "libtpu, the TPU compiler, is not installed (700 MB; no TPU is needed): "
            f"{libtpu_command()}"
        )
    for name, value in {
        # Other processes may have it loaded, too.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # It would look for a TPU machine's services.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, platform="tpu").devices


def _described_gpus(chip: str, shape: str) -> Sequence[Any]:
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        wanted = " ".join(
            f"{name}=={jax.__version__}"
            for name in ("jax-cuda13-pjrt", "jax-cuda13-plugin")
        )
        raise NoCompilerError(
            "the compiler for GPUs is not installed (400 MB, and the CUDA toolkit; no "
            f"GPU is needed): pip install --no-deps {wanted}"
        )
    told = _GPU % (*_HOPPER[chip], chip.upper())
    return topologies.get_topology_desc(
        "", platform="cuda", topology=shape, target_config=told
    ).devices


@contextlib.contextmanager
def cudnn_of_described() -> Iterator[None]:
    """Lets jax lower cuDNN's attention for Hopper where no GPU and no cuDNN is."""
    asked = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    # They ask the machine that compiles.
    told = {
        "check_cudnn_version": lambda: 91_900,
        "check_compute_capability": lambda wanted: True,
        "is_cuda_compute_capability_equal": lambda wanted: False,
    }
    with mock.patch.multiple(asked, **told):
        yield


def use_compilation_cache(use: bool) -> None:
    """Turns the cache on disk on or off; it cannot read described slices' programs."""
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()


def libtpu_command() -> str:
    """Returns the command that installs the libtpu that the installed jax asks for."""
    for wanted in importlib.metadata.requires("jax") or ():
        name = wanted.partition(";")[0].strip()
        if name.startswith("libtpu") and "extra" in wanted:
            return f"pip install '{name}'"
    return f"pip install 'jax[tpu]=={jax.__version__}'"


def measure(
    program: recipe_programs.Program,
    hbm_bytes: float,
    known: tables.Row | None = None,
    place: str = "",
) -> tables.Row:
    """Compiles a program; returns its columns of the table.

    `known` is an earlier row: of the same program for the same `place` and compiler, it
    says what the compiler did.
    """
    started = time.perf_counter()
    lowered = program.lower()
    row: tables.Row = {"program": program.name}
    told = {"lowered_digest": _digest(lowered, place)}
    told["lower_s"] = round(time.perf_counter() - started, 1)
    if known and known.get("lowered_digest") == told["lowered_digest"]:
        told = {name: known.get(name) for name in (*told, *_OF_COMPILER)}
    else:
        told |= _compiled(lowered)
    if program.row_cost:
        cost = program.row_cost()
        row |= {"row_flops": int(cost.flops), "row_bytes": int(cost.num_bytes)}
    row |= told
    if told.get("refused"):
        return row | {"fits": False}
    arguments = told["argument_bytes"]
    beside = program.beside_bytes + max(0, program.given_bytes - arguments)
    total = sum(told[f"{name}_bytes"] for name in ("output", "temp", "code"))
    total += arguments + beside
    return row | {
        "beside_bytes": beside,
        "total_bytes": total,
        "hbm_bytes": int(hbm_bytes),
        "fits": total <= hbm_bytes,
    }


def _digest(lowered: jax.stages.Lowered, place: str) -> str:
    """Returns a digest of all that a compiler is given, and of the compilers."""
    names = "jaxlib", "libtpu", "jax-cuda13-pjrt"
    versions = [provenance.version_of(name) for name in names]
    return provenance.digest(f"{place}{_HOPPER}{_GPU}{versions}{lowered.as_text()}")


def _compiled(lowered: jax.stages.Lowered) -> tables.Row:
    """Compiles; returns what the compiler says, the columns `_OF_COMPILER`."""
    started, used = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses what exceeds the chip, and says by how much.
        return {"refused": first_line(error)}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    counts = collectives(compiled.as_text())
    return {
        "compile_s": round(time.perf_counter() - started, 1),
        "compile_cpu_s": round(time.process_time() - used, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        **{f"num_{kind.replace('-', '_')}": counts[kind] for kind in _COLLECTIVES},
    }


def collectives(text: str) -> collections.Counter:
    """Counts collectives by kind in a compiled program's text, loop bodies once."""
    kinds = "|".join(_COLLECTIVES)
    found = re.findall(rf"^[^=]*= [^=]*? ({kinds})(?:-start)?\(", text, re.MULTILINE)
    return collections.Counter(found)


def first_line(error: Exception) -> str:
    """Returns the line of a compiler's error that says what it lacks."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "exceeds" in line or "Ran out" in line]
    return (told or lines)[0][:200]


def architecture_of(variant: str) -> model_config.ModelConfig:
    """Returns the model of a variant of configs/grpo.py, whatever its devices."""
    return ARCHITECTURES[variant.partition("@")[0]]


def run_model(
    name: str, wanted: Sequence[str], known: Mapping[str, tables.Row]
) -> Iterator[tables.Row]:
    """Compiles the wanted programs (none named: all) of one variant; yields rows.

    `known` are its rows by program, see `measure`.
    """
    model, place, config = architecture_of(name), SLICES[name], grpo.get_config(name)
    run, devices = config_lib.load(config), described_devices(place)
    recipe = recipe_programs.Recipe(model, run, devices)
    config.specdec.mode = "tlt"
    tlt = recipe_programs.Recipe(model, config_lib.load(config), devices)
    every = [*recipe.programs(), *tlt.rollouts(), *tlt.drafter_training()]
    if name in _BOTH:
        config.learner.attention = "portable"
        portable = recipe_programs.Recipe(model, config_lib.load(config), devices)
        (accumulate, *_) = portable.updates()
        every.insert(1, dataclasses.replace(accumulate, name=_PORTABLE))
    for program in every:
        is_wanted = program.name in wanted if wanted else program.name not in _LESS
        if not is_wanted:
            continue
        print(f"{program.name} of {name} for {place} ...", flush=True)
        chip = place.partition(":")[0]
        yield {
            "model": name,
            "slice": place,
            "mesh": "x".join(str(size) for size in recipe.mesh.devices.shape),
            "row_tokens": run.learner.row_tokens,
            "rows_per_device": run.learner.rows_per_micro_batch,
            "head_chunk": recipe.learner.forward_cfg.head_chunk,
            "remat": run.model.remat,
            "max_batch": run.rollout.max_batch,
            "drafter_row_tokens": run.adaptation.row_tokens,
            **measure(program, HBM_BYTES[chip], known.get(program.name), place),
        }


def without_devices() -> None:
    """Keeps jax from looking for the TPU that libtpu promises: nothing runs."""
    jax.config.update("jax_platforms", "cpu")
    use_compilation_cache(False)


def compile_all(
    options: argparse.Namespace, folder: pathlib.Path, record: provenance.Provenance
) -> list[tables.Row]:
    """Compiles what is wanted; returns the rows that it made."""
    without_devices()
    path = tables.path_of(folder, "ahead_of_time")
    current = record.record["source_hash"]
    commit = (record.record["commit"] or "unknown")[:10]
    old = tables.read(path) if path.is_file() else []
    if old:
        # Rows that are kept keep their record, to which this run's is added.
        stored = provenance.read(folder, "ahead_of_time")
        record.resume(stored, options.models)
    made: list[tables.Row] = []
    num_kept = 0
    with cudnn_of_described():
        for name in options.models:
            its = [row for row in old if row["model"] == name]
            known = {} if options.again else {str(row["program"]): row for row in its}
            for row in run_model(name, options.programs, known):
                num_kept += bool(row.get("commit"))
                made.append(row | {"commit": row.get("commit") or commit})
                tables.write(path, merged(old, made))
                record.write(path.with_suffix(".json"))
            if not options.programs:
                # Recipes change: what it has no more goes.
                old = [row for row in old if row["model"] != name]
                tables.write(path, merged(old, made))
            jax.clear_caches()
    if not old:
        # Every row is of today's code.
        record.record["source_hash"] = current
        record.record.pop("carried", None)
        record.write(path.with_suffix(".json"))
    print(tables.shown([_in_short(row) for row in made]))
    print(f"{len(made) - num_kept} compiled, {num_kept} of earlier calls kept.")
    return made


def merged(old: Sequence[tables.Row], new: Sequence[tables.Row]) -> list[tables.Row]:
    """Returns the rows in the order of the variants, new ones for old ones."""
    rows = {(row["model"], row["program"]): row for row in [*old, *new]}
    order = list(grpo.VARIANTS)
    return sorted(rows.values(), key=lambda row: order.index(row["model"]))


def _in_short(row: tables.Row) -> tables.Row:
    short = {key: row.get(key) for key in ("model", "slice", "program")}
    for key in ("argument", "temp", "beside", "total", "hbm"):
        value = row.get(f"{key}_bytes")
        short[f"{key}_gib"] = None if value is None else value / GIB
    return short | {key: row.get(key) for key in ("fits", "compile_cpu_s")}


def check(options: argparse.Namespace) -> None:
    """Reads the lists of names."""
    options.models = experiment.known(options.models, grpo.VARIANTS, "models")
    options.programs = list(filter(None, options.programs.split(",")))


EXPERIMENT = experiment.Experiment(
    slug="ahead_of_time",
    text=__doc__,
    title="large recipes compiled for TPUs and GPUs",
    options=(
        experiment.Option("models", ",".join(grpo.VARIANTS)),
        experiment.Option("programs", "", "such as accumulate,decode_64"),
    ),
    check=check,
    settings=lambda options: {
        "programs": options.programs or "all",
        "slices": {name: SLICES[name] for name in options.models},
    },
    run=compile_all,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
