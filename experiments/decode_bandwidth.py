"""Plain decoding at batch 1: what share of the memory's bandwidth does it reach?

    python -m experiments.decode_bandwidth --scale=cpu
    python -m experiments.decode_bandwidth --scale=one_gpu --model=qwen2.5-7b \
        --dtype=bfloat16 --contexts=512,8192 --steps=256

One row is decoded by the rollout engine's own program, all layers, head and draw, over
a cache that holds `context` positions already. A step's time is the slope between a
short and a long call: what starting a call and fetching its tokens cost cancels
(`call_tokens_per_s` counts it in). A token needs at least all weights but the rows of
the embedding that nobody looks up, and the keys and values of its context, once:
`minimal_bytes`. `bandwidth_frac` is these bytes by a step's time by the bandwidth that
the device's vendor publishes; on a CPU by what reading or copying large arrays on all
cores reached just before or after, whichever is more.

`--model` is any model that `tlt_jax.generate` takes, or one of the sizes described
here, with random weights. Target: 85 % on one H200, 7B, bf16.
"""

import argparse
import concurrent.futures
import importlib.metadata
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import harness, plotting
from tlt_jax import policy
from tlt_jax.models import config as model_config
from tlt_jax.models import kv_cache
from tlt_jax.models import params as model_params
from tlt_jax.pallas_kernels.verify_attention import bench
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import compile_cache
from tlt_jax.specdec import decode, sampling

SLUG = "decode_bandwidth"
SYSTEM = "tlt_jax"
TARGET = 0.85
METRICS = dict.fromkeys(
    ("tokens_per_s", "call_tokens_per_s", "bandwidth_frac", "limit_gb_per_s"), "higher"
)
CASE_KEYS = ("context", "temperature")


def _model(vocab, width, d_ff, heads, kv_heads, head_dim, layers, tied):
    return model_config.ModelConfig(
        family="qwen2",
        vocab_size=vocab,
        num_layers=layers,
        d_model=width,
        d_ff=d_ff,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_embeddings=tied,
        qkv_bias=True,
    )


# Sizes of published models, and one for tests.
DESCRIBED = {
    "qwen2.5-7b": _model(152_064, 3584, 18_944, 28, 4, 128, 28, False),
    "qwen2.5-1.5b": _model(151_936, 1536, 8960, 12, 2, 128, 28, True),
    "tiny": _model(64, 32, 48, 2, 1, 16, 2, False),
}
_LIMIT_BYTES, _LIMIT_REPEATS = 2**28, 3


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument(
        "--model",
        default=harness.DEFAULT_MODEL,
        help=f"as tlt_jax.generate takes it, or random: {', '.join(DESCRIBED)}",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of all"
    )
    parser.add_argument("--contexts", default="128,512", help="positions cached before")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--steps", type=int, default=64, help="of a long call")
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=0.0,
        help="bytes per second, of an accelerator that is not known here",
    )
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps={options.steps}: a slope needs at least 4.")
    return options


def load(options: argparse.Namespace) -> tuple[model_config.ModelConfig, object]:
    """Returns the model and its weights, layers as rollout engines have them."""
    if options.model not in DESCRIBED:
        found = policy.load(options.model, options.dtype)
        return found.config, found.params
    cfg, dtype = DESCRIBED[options.model], jnp.dtype(options.dtype)

    def make(key):
        return model_params.unstack(model_params.init(cfg, key, dtype))

    return cfg, jax.jit(make)(jax.random.key(0))


def minimal_bytes(cfg: model_config.ModelConfig, params, context: float) -> int:
    """Returns what a token needs at least, weights and cache read once."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not cfg.tie_embeddings:
        weights -= params.embed.nbytes
    columns = kv_cache.page_bytes(cfg, 1, params.embed.dtype)
    return int(weights + columns * context)


class Decoder:
    """An engine's program for one row, and a cache that it finds filled."""

    def __init__(self, cfg, params, options, context: int, temperature: float):
        """Compiles it; no prompt is read, since no time hangs on what is cached."""
        self._params, self._steps = params, options.steps
        most = context + options.steps
        engine = engine_lib.Engine(
            cfg,
            engine_programs.EngineConfig(
                max_rows=1,
                max_length=most,
                page_size=options.page_size,
                steps_per_call=options.steps,
                sampling_cfg=sampling.SamplingConfig(temperature),
                dtype=options.dtype,
            ),
        )
        engine.set_params(params, version=0)
        self._program = engine.pool.get(engine.programs.plain_decode(params, 1))
        self._cache = engine.pool.get(engine.programs.empty_caches())().target
        engine.pool.close()
        num_pages = engine.engine_cfg.max_pages
        self._rows = decode.Rows(
            page_table=1 + np.arange(num_pages, dtype=np.int32)[None],
            lengths=np.array([context], np.int32),
            pending=np.ones(1, np.int32),
            keys=np.ones((1, 2), np.uint32),
            remaining=np.array([most], np.int32),
        )

    def seconds(self, num_steps: int) -> float:
        """Times one call of so many steps, its tokens fetched."""
        started = time.perf_counter()
        self._cache, emitted = self._program(
            self._params, self._cache, self._rows, np.int32(num_steps), np.int32(1)
        )
        taken = jax.device_get(emitted).num_steps
        elapsed = time.perf_counter() - started
        assert taken == num_steps, (taken, num_steps)
        return elapsed

    def measure(self) -> tuple[float, float]:
        """Returns seconds of a step, and of a whole long call."""
        few = self._steps // 4
        self.seconds(few)  # Whatever ran before has the machine's caches.
        short, long = self.seconds(few), self.seconds(self._steps)
        return (long - short) / (self._steps - few), long


def measured_limit() -> float:
    """Returns bytes per second that reading or copying on all cores reaches."""
    num_threads = len(os.sched_getaffinity(0))
    size = _LIMIT_BYTES // 4 // num_threads
    arrays = [np.ones(size, np.float32) for _ in range(num_threads)]
    copies = [np.ones(size, np.float32) for _ in range(num_threads)]

    def rate(work, num_bytes):
        times = []
        for _ in range(_LIMIT_REPEATS):
            started = time.perf_counter()
            list(pool.map(work, arrays, copies))
            times.append(time.perf_counter() - started)
        return num_bytes / min(times)

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        read = rate(lambda array, copy: np.dot(array, array), _LIMIT_BYTES)
        copied = rate(lambda array, copy: np.copyto(copy, array), 2 * _LIMIT_BYTES)
    return max(read, copied)


def limit_of(kind: str, platform: str, asked: float) -> float | None:
    """Returns a device's published bandwidth; None: it has to be measured.

    Raises:
      ValueError: an accelerator whose bandwidth is not known.
    """
    if asked:
        return asked
    if platform == "cpu":
        return None
    if kind not in bench.BANDWIDTH:
        raise ValueError(
            f"the bandwidth of {kind!r} is not known here, only that of "
            f"{', '.join(bench.BANDWIDTH)}: give --bandwidth=BYTES_PER_S."
        )
    return bench.BANDWIDTH[kind]


def plot(summary: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws the share of the bandwidth."""
    fig, axes = plotting.figure(
        f"Plain decoding at batch 1, {summary[0]['model']}, {summary[0]['dtype']}",
        "",
        "share of the memory's bandwidth",
        stamp,
    )
    drawn = [row for row in summary if row.get("bandwidth_frac/median")]
    names = [f"{r['context']} cached, T={r['temperature']:g}" for r in drawn]
    plotting.bars(axes, names, drawn, "bandwidth_frac", "%.2f")
    axes.axhline(TARGET, color=plotting.COLORS[3], linestyle="--", label="target, H200")
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    compile_cache.enable()
    device = jax.devices()[0]
    published = limit_of(device.device_kind, device.platform, options.bandwidth)
    contexts = [int(text) for text in options.contexts.split(",")]
    temperatures = [float(text) for text in options.temperatures.split(",")]
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("scale", "out")
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    told = {"device_kind": device.device_kind, "published_limit": published}
    provenance = harness.Provenance(SLUG, settings | told, versions)
    cfg, params = load(options)
    cases = [
        {"context": context, "temperature": temperature}
        for context in contexts
        for temperature in temperatures
    ]
    decoders = {
        tuple(case.values()): Decoder(cfg, params, options, *case.values())
        for case in cases
    }
    about = {"model": options.model, "dtype": options.dtype}
    about |= {"device": device.device_kind}

    def measure(name, case, number):
        before = published or measured_limit()
        step_s, call_s = decoders[tuple(case.values())].measure()
        limit = max(before, published or measured_limit())
        mean_context = case["context"] + 5 / 8 * options.steps
        needed = minimal_bytes(cfg, params, mean_context)
        row = about | {"minimal_bytes": needed, "limit_gb_per_s": limit / 1e9}
        row["call_tokens_per_s"] = options.steps / call_s
        # Noise can exceed what a few steps of a tiny model take.
        if step_s <= 0:
            return row | dict.fromkeys(("step_ms", "tokens_per_s", "bandwidth_frac"))
        return row | {
            "step_ms": 1e3 * step_s,
            "tokens_per_s": 1 / step_s,
            "bandwidth_frac": needed / step_s / limit,
        }

    rows = harness.run_paired(
        [SYSTEM], cases, measure, rounds=options.rounds, warmups=1
    )
    summary = harness.summarise(
        rows, case_keys=CASE_KEYS, metrics=METRICS, reference=SYSTEM
    )
    first = {tuple(row[key] for key in CASE_KEYS): row for row in reversed(rows)}
    for row in summary:
        its = first[tuple(row[key] for key in CASE_KEYS)]
        row.update(about | {"minimal_bytes": its["minimal_bytes"]})
    harness.write_results(options, SLUG, rows, summary, provenance)
    out = harness.folder_of(options)
    plot(summary, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
