"""Times verification attention on the accelerator that is there.

    python -m tlt_jax.pallas_kernels.verify_attention.bench --out=bench

A call's time is the slope between short and long runs of calls inside one program: what
starting and fetching cost cancels. Every call reads another layer, so that caches hold
nothing of what it reads. `bandwidth_frac` is the least that must be moved, by that
time, by the bandwidth that a plain copy reached in the same run: no program reaches
what vendors publish. `dot_product_attention_*` and `paged_attention` are jax's own on
arguments of the same size, with contiguous keys or pages as they want them.

Targets, of one H200: 80 % of a copy's bandwidth on `verify_b32_8k_w16`, and jax's own
speed on every argument set that jax takes. The last lines say which were reached.
"""

import argparse
import csv
import dataclasses
import datetime
import functools
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tlt_jax.pallas_kernels.verify_attention import api, arg_specs, page_layout

# Bytes per second of the memory, as vendors publish it: for chips that are not there.
BANDWIDTH = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA A100-SXM4-80GB": 2.04e12,
    "TPU v5 lite": 8.19e11,
    "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
}
OURS = ("mosaic_tpu", "triton_gpu", "reference")
_DENSE = "dot_product_attention_"
PEERS = (_DENSE + "cudnn", _DENSE + "xla", "paged_attention")
TARGET_ARGUMENTS, TARGET_FRAC = "verify_b32_8k_w16", 0.8
# What all layers together take at least: several times a chip's caches.
_COLD_BYTES = 2**28
_ROUNDS = 5

Row = dict[str, Any]
# What a call reads, and the call: state (an array like the query), a layer's index and
# what it reads to a new state.
Call = tuple[Any, Callable[[jax.Array, jax.Array, Any], jax.Array]]


def cold(spec: arg_specs.ArgSpec) -> arg_specs.ArgSpec:
    """Give a spec so many layers that reading them in turn finds nothing cached."""
    layers = -(-_COLD_BYTES // spec.minimal_bytes)
    return dataclasses.replace(spec, num_layers=min(max(layers, 2), 64))


def arguments(spec: arg_specs.ArgSpec, name: str) -> dict[str, jax.Array | None]:
    """Draw an implementation's arguments on the device; pages stand in no order."""
    rng = np.random.default_rng(0)
    made = {}
    for argument, leaf in arg_specs.shapes(spec, name).items():
        if leaf is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            key = jax.random.key(len(made))
            draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
            made[argument] = draw(key, leaf.shape, leaf.dtype)
    table = arg_specs.draw_page_table(spec, rng, 0)
    lengths = np.array(spec.lengths, np.int32)
    words, depths = None, np.arange(spec.num_tokens)
    if spec.kind == "tree":
        words, depths = arg_specs.random_words(rng, spec.num_tokens)
        words = jnp.asarray(np.broadcast_to(words, (spec.batch, *words.shape)))
    return made | dict(
        page_table=jnp.asarray(table),
        lengths=jnp.asarray(lengths),
        positions=jnp.asarray(lengths[:, None] + depths, jnp.int32),
        words=words,
        layer=jnp.int32(0),
    )


def our_call(spec: arg_specs.ArgSpec, name: str) -> Call:
    """Make a call of one of our implementations."""

    def call(query, layer, given):
        out, _ = api.verify_attention(
            **given | dict(query=query, layer=layer),
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
            packing=page_layout.packing(name, spec.page_size, spec.head_dim),
            implementation=api.Implementation(name),
        )
        return out.astype(query.dtype)

    return arguments(spec, name), call


def peer_call(spec: arg_specs.ArgSpec, name: str) -> Call:
    """Make a call of one of jax's own, over keys in the order that it wants.

    Raises:
      NotImplementedError: it cannot compute this.
    """
    if spec.soft_cap is not None or spec.window is not None:
        raise NotImplementedError("no window or soft cap")
    if len(set(spec.lengths)) > 1:
        raise NotImplementedError("rows of one length only")
    dtype, (batch, num_kv, group) = jnp.dtype(spec.dtype), spec.query_shape[:3]
    num_heads, length = num_kv * group, spec.lengths[0]

    def draw(*shape):
        return jax.random.normal(jax.random.key(0), shape, dtype)

    if name == "paged_attention":
        if spec.num_tokens > 1:
            raise NotImplementedError("one query a row only")
        num_pages = -(-length // spec.page_size)
        pages = [
            draw(num_kv, batch * num_pages, spec.page_size, spec.head_dim)
            for _ in range(2 * spec.num_layers)
        ]
        order = np.random.default_rng(0).permutation(batch * num_pages)
        table = jnp.asarray(order.reshape(batch, num_pages).astype(np.int32))
        lengths = jnp.full((batch,), length, jnp.int32)
        attend = _paged_attention()

        def call(query, layer, given):
            pages, *where = given
            rows = query.reshape(batch, num_heads, spec.head_dim)
            branches = [
                functools.partial(attend, keys, values, *where)
                for keys, values in zip(pages[::2], pages[1::2], strict=True)
            ]
            return lax.switch(layer, branches, rows).reshape(query.shape)

        return (pages, table, lengths), call

    backend = name.removeprefix(_DENSE)
    num_keys = length + spec.num_tokens
    both = draw(2, spec.num_layers, batch, num_keys, num_kv, spec.head_dim)

    def call(query, layer, both):
        rows = jnp.moveaxis(query.reshape(batch, num_heads, -1, spec.head_dim), 1, 2)
        out = jax.nn.dot_product_attention(
            *(rows, both[0, layer], both[1, layer]), implementation=backend
        )
        return jnp.moveaxis(out, 2, 1).reshape(query.shape)

    return both, call


def _paged_attention() -> Callable:
    if jax.default_backend() == "tpu":
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

        def attend(keys, values, table, lengths, rows):
            return paged_attention(
                *(rows, keys, values, lengths, table), pages_per_compute_block=4
            )

    elif jax.default_backend() == "gpu":
        from jax.experimental.pallas.ops.gpu import paged_attention as of_gpu

        def attend(keys, values, table, lengths, rows):
            return of_gpu.paged_attention(rows, keys, values, table, lengths)

    else:
        raise NotImplementedError("needs a TPU or GPU")
    return attend


def seconds_per_call(
    call: Call, query: jax.Array, num_layers: int, calls: int
) -> list[float]:
    """Time a call; return seconds per call, one of each round.

    Args:
      call: what to time.
      query: the first state.
      num_layers: that the calls read in turn.
      calls: of the long run; the short one has a quarter.
    """
    given, one = call

    @functools.partial(jax.jit, static_argnums=2)
    def run(query, given, count):
        def body(i, state):
            return one(state, i % num_layers, given)

        return lax.fori_loop(0, count, body, query)

    def timed(count):
        started = time.perf_counter()
        jax.block_until_ready(run(query, given, count))
        return time.perf_counter() - started

    few = max(calls // 4, 1)
    for count in (few, calls):
        timed(count)
    return [(timed(calls) - timed(few)) / (calls - few) for _ in range(_ROUNDS)]


def copy_bandwidth(calls: int = 32, num_bytes: int = _COLD_BYTES) -> float:
    """Time a copy; return the bytes per second that it reads and writes."""
    state = jnp.zeros((num_bytes // 4,), jnp.float32)
    # Carried by the loop, so that each call reads what the last one wrote.
    times = seconds_per_call((None, lambda x, layer, given: x + 1), state, 1, calls)
    return 2 * num_bytes / float(np.median(times))


def measure(
    spec: arg_specs.ArgSpec, name: str, calls: int = 32, bandwidth: float | None = None
) -> Row:
    """Time one implementation on one spec; returns its row of the table.

    `bandwidth` is what shares are of, in bytes per second; None: none are told.
    """
    kind = jax.devices()[0].device_kind
    row: Row = {"arguments": spec.name, "implementation": name, "device": kind}
    if name not in (*OURS, *PEERS):
        raise ValueError(
            f"implementation {name!r} is not known: use {', '.join((*OURS, *PEERS))}."
        )
    spec = cold(spec)
    try:
        call = (our_call if name in OURS else peer_call)(spec, name)
        query = jax.random.normal(jax.random.key(9), spec.query_shape)
        times = seconds_per_call(call, query.astype(spec.dtype), spec.num_layers, calls)
    except (NotImplementedError, ValueError, RuntimeError, ImportError) as error:
        # A peer that is missing, or refuses, is a row of its own; so are we.
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    middle, moved = float(np.median(times)), spec.minimal_bytes
    return row | {
        "median_us": round(middle * 1e6, 1),
        "min_us": round(min(times) * 1e6, 1),
        "max_us": round(max(times) * 1e6, 1),
        "minimal_bytes": moved,
        "gb_per_s": round(moved / middle / 1e9, 1),
        "bandwidth_frac": bandwidth and round(moved / middle / bandwidth, 3),
        "tflop_per_s": round(spec.minimal_flops / middle / 1e12, 2),
    }


def verdicts(rows: list[Row]) -> list[str]:
    """Say of each target whether our kernels' rows reach it; nothing without one."""
    told = []
    done = {
        (row["arguments"], row["implementation"]): row
        for row in rows
        if "failed" not in row
    }

    def tell(reached, what):
        told.append(f"{'reached' if reached else 'missed'}: {what}")

    for (name, implementation), row in done.items():
        if implementation not in OURS[:2]:
            continue
        ours, frac = row["median_us"], row["bandwidth_frac"]
        if name == TARGET_ARGUMENTS and frac is not None:
            goal = f"{TARGET_FRAC:.0%} of a copy's bandwidth on {name} ({frac:.1%})"
            tell(frac >= TARGET_FRAC, goal)
        peers = [peer for peer in PEERS if (name, peer) in done]
        theirs = {peer: done[name, peer]["median_us"] for peer in peers}
        if theirs:
            best = min(theirs, key=theirs.get)
            goal = f"jax's own speed on {name} ({ours} us; {best} {theirs[best]} us)"
            tell(ours <= theirs[best], goal)
    return told


def provenance() -> Row:
    """Tell what ran where."""

    def git(*words):
        made = subprocess.run(("git", *words), capture_output=True, text=True)
        return made.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "-uno")),
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    }


def main(words: list[str] | None = None) -> list[Row]:
    """Measure what the command line asks for; returns the rows written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = ",".join(spec.name for spec in arg_specs.LARGE)
    parser.add_argument("--arguments", default=named, help="names of arg_specs")
    parser.add_argument("--implementations", default="", help="default: kernel, peers")
    parser.add_argument("--calls", type=int, default=32, help="of a long run")
    mib = _COLD_BYTES // 2**20
    parser.add_argument("--copy-mib", type=int, default=mib, help="of the plain copy")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench"))
    options = parser.parse_args(words)
    ours = api.for_platform(jax.default_backend())
    if ours is None and not options.implementations:
        parser.error(
            "there is no TPU or GPU here, and nothing that is worth timing: name "
            f"--implementations among {', '.join((*OURS, *PEERS))} to do so anyway."
        )
    names = options.implementations.split(",") if options.implementations else ()
    specs = [arg_specs.by_name(name) for name in options.arguments.split(",")]
    bandwidth = copy_bandwidth(options.calls, options.copy_mib * 2**20)
    record, rows = provenance() | {"copy_gb_per_s": round(bandwidth / 1e9, 1)}, []
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "verify_attention.json").write_text(json.dumps(record, indent=2))
    for spec in specs:
        for name in names or (ours, *PEERS):
            rows.append(measure(spec, name, options.calls, bandwidth))
            print(json.dumps(rows[-1]), flush=True)
            _write(options.out / "verify_attention.csv", rows)
    print(*verdicts(rows), sep="\n")
    return rows


def _write(path: pathlib.Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
