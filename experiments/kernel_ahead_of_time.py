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

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import ahead_of_time, kernel_peers
from experiments.lab import experiment, tables
from tlt_jax.pallas_kernels.verify_attention import api, arg_specs, bench, page_layout
from tlt_jax.runtime import sharding

OURS = "ours"
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
) -> tables.Row | None:
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


def measure_cell(context: None, cell: tables.Cell) -> list[tables.Row]:
    """Compiles one argument set for one chip, ours and jax's own kernels."""
    del context  # No device is looked for.
    spec = arg_specs.by_name(cell["arguments"])
    found = [measure(spec, cell["chip"], name) for name in (OURS, *kernel_peers.PEERS)]
    return [row for row in found if row]


EXPERIMENT = experiment.Experiment(
    slug="kernel_ahead_of_time",
    text=__doc__,
    title="attention kernels compiled for TPUs",
    options=(
        experiment.Option("chips", ",".join(CHIPS)),
        experiment.Option(
            "arguments",
            ",".join(spec.name for spec in arg_specs.LARGE),
            "names of arg_specs",
        ),
    ),
    settings=lambda options: {
        "chips": experiment.known(options.chips, CHIPS, "chips"),
        "arguments": [
            arg_specs.by_name(name).name for name in options.arguments.split(",")
        ],
    },
    context=ahead_of_time.without_devices,
    cells=lambda chips, arguments: [
        tables.Cell({"chip": chip, "arguments": name}, None)
        for chip in chips
        for name in arguments
    ],
    measure=measure_cell,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
