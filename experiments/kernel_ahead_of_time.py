"""Compiles the attention kernels for chips that are not there: what do they move?

    python -m experiments.kernel_ahead_of_time
    python -m experiments.kernel_ahead_of_time --chips=v5e --arguments=decode_b32_8k

Every named argument set of `verify_attention/arg_specs.py` with the shapes of a real
model is compiled for TPUs of three generations by the TPU compiler (libtpu), which
needs no TPU. `bytes_accessed` and `flops` are the compiler's: the kernel's own estimate
for rows that fill their page table (one page more than the row needs), and whatever the
compiler does around it. `bytes_ratio` divides by the least that must be moved, cached
and fresh columns, queries and output once. `temp_bytes` would tell a copy of the cache.
jax's own kernels stand beside ours where they take the arguments (`kernel_peers`).
No time is measured: `bound_us` is that least by the chip's bandwidth.
"""

import argparse
import csv
import functools
import importlib.metadata
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import ahead_of_time, kernel_peers
from experiments.lab import harness
from tlt_jax.pallas_kernels.verify_attention import (
    api,
    arg_specs,
    bench,
    page_layout,
)
from tlt_jax.runtime import sharding

SLUG = "kernel_ahead_of_time"
OURS = "ours"
UNMEASURED = (
    "Bytes and operations are by the compiler's account (for jax's own kernels partly "
    "by their source), beside the least that there can be. Device time is unmeasured."
)
# A described slice, and the kind of its devices.
CHIPS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
}


def compiled(call: Callable[..., Any], shapes: Any, chip: str) -> jax.stages.Compiled:
    """Compiles a call of some shapes for one device of a described slice."""
    device = ahead_of_time.described_devices(CHIPS[chip][0])[0]
    mesh = Mesh(np.array([device]), ("x",))
    where = sharding.replicated(mesh)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
    )
    # The kernel's compiler asks which chip it is for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(call).lower(*arguments).compile()


def our_call(spec: arg_specs.ArgSpec) -> tuple[Callable[..., Any], Any]:
    """Returns a call of our kernel, and the shapes that it takes."""
    call = functools.partial(
        api.verify_attention,
        scale=spec.scale,
        window=spec.window,
        soft_cap=spec.soft_cap,
        packing=page_layout.packing("mosaic_tpu", spec.page_size, spec.head_dim),
        implementation=api.Implementation("mosaic_tpu"),
    )
    return lambda given: call(**given)[0], (arg_specs.shapes(spec, "mosaic_tpu"),)


def measure(
    spec: arg_specs.ArgSpec, chip: str, implementation: str = OURS
) -> harness.Row | None:
    """Compiles one argument set for one chip; returns its row of the table.

    None: the implementation does not take the arguments.
    """
    inside = 0
    if implementation == OURS:
        call, shapes = our_call(spec)
    else:
        peer = kernel_peers.PEERS[implementation](spec)
        if peer is None:
            return None
        call, shapes, inside = peer.call, peer.shapes, peer.kernel_bytes
    used = time.process_time()
    program = compiled(call, shapes, chip)
    used = time.process_time() - used
    memory, cost = program.memory_analysis(), program.cost_analysis()
    bandwidth = bench.BANDWIDTH[CHIPS[chip][1]]
    moved = cost["bytes accessed"] + inside
    row = {
        "chip": chip,
        "arguments": spec.name,
        "implementation": implementation,
        "shape": "x".join(map(str, spec.query_shape)),
        "dtype": spec.dtype,
        "minimal_bytes": spec.minimal_bytes,
        "bytes_accessed": int(moved),
        "bytes_ratio": round(moved / spec.minimal_bytes, 3),
        "minimal_flops": spec.minimal_flops,
    }
    if implementation == OURS:
        row["flops"] = int(cost["flops"])
        row["flops_ratio"] = round(cost["flops"] / spec.minimal_flops, 3)
    return row | {
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "bound_us": round(spec.minimal_bytes / bandwidth * 1e6, 1),
        "compile_cpu_s": round(used, 1),
    }


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a table that was written before."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the rows that it made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--chips", default=",".join(CHIPS))
    named = ",".join(spec.name for spec in arg_specs.LARGE)
    parser.add_argument("--arguments", default=named, help="names of arg_specs")
    options = parser.parse_args(arguments)
    chips = options.chips.split(",")
    unknown = [chip for chip in chips if chip not in CHIPS]
    if unknown:
        parser.error(f"--chips names {', '.join(unknown)}; known: {', '.join(CHIPS)}.")
    specs = [arg_specs.by_name(name) for name in options.arguments.split(",")]
    # Nothing runs; without this jax would look for the TPU that libtpu promises.
    jax.config.update("jax_platforms", "cpu")
    ahead_of_time.use_compilation_cache(False)
    ahead_of_time.described_devices(CHIPS[chips[0]][0])
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")
    }
    out = harness.folder_of(options)
    settings = {"chips": chips, "arguments": [spec.name for spec in specs]}
    provenance = harness.Provenance(SLUG, settings, versions)
    rows = []
    for chip in chips:
        for spec in specs:
            for implementation in (OURS, *kernel_peers.PEERS):
                made = measure(spec, chip, implementation)
                rows += [made] if made else []
            harness.write_csv(out / f"{SLUG}.csv", rows)
            provenance.write(out / f"{SLUG}.json")
    shown = ("chip", "arguments", "implementation", "minimal_bytes", "bytes_accessed")
    shown += ("bytes_ratio", "minimal_flops", "flops", "flops_ratio", "temp_bytes")
    print(harness.format_table([{k: row.get(k) for k in shown} for row in rows]))
    print(UNMEASURED)
    return rows


if __name__ == "__main__":
    try:
        main()
    except ahead_of_time.NoCompilerError as error:
        sys.exit(f"error: {error}")
