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
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import claims, experiment, paired, plotting, random_drafter, tables
from tlt_jax import policy
from tlt_jax.models import config as model_config
from tlt_jax.models import kv_cache
from tlt_jax.models import params as model_params
from tlt_jax.pallas_kernels.verify_attention import bench
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import compile_cache
from tlt_jax.specdec import decode, sampling

SYSTEM = "tlt_jax"
TARGET = 0.85
METRICS = dict.fromkeys(
    ("tokens_per_s", "call_tokens_per_s", "bandwidth_frac", "limit_gb_per_s"), "higher"
)
CASE_KEYS = ("context", "temperature")


# Sizes of published models, and one for tests.
DESCRIBED = {
    name: random_drafter.model_of(shape, "qwen2", tie_embeddings=tied, qkv_bias=True)
    for name, shape, tied in (
        ("qwen2.5-7b", (152_064, 3584, 18_944, 28, 4, 128, 28), False),
        ("qwen2.5-1.5b", random_drafter.SHAPES["qwen2.5-1.5b"], True),
        ("tiny", (64, 32, 48, 2, 1, 16, 2), False),
    )
}
_LIMIT_BYTES, _LIMIT_REPEATS = 2**28, 3
OPTIONS = (
    experiment.Option(
        "model",
        paired.DEFAULT_MODEL,
        f"as tlt_jax.generate takes it, or random: {', '.join(DESCRIBED)}",
    ),
    experiment.Option("dtype", "float32", "of all", choices=("float32", "bfloat16")),
    experiment.Option("contexts", "128,512", "positions cached before"),
    *experiment.plain(temperatures="0,1", page_size=128, rounds=5),
    experiment.Option("steps", 64, "of a long call"),
    experiment.Option(
        "bandwidth", 0.0, "bytes per second, of an accelerator that is not known here"
    ),
)


def check(options: argparse.Namespace) -> None:
    """Refuses calls too short for a slope."""
    if options.steps < 4:
        raise ValueError(f"--steps={options.steps}: a slope needs at least 4.")
    experiment.numbers(options.contexts, "contexts")
    experiment.numbers(options.temperatures, "temperatures", float)


def settings_of(options: argparse.Namespace) -> tables.Row:
    """Returns the device and its bandwidth, if that is published."""
    device = jax.devices()[0]
    limit = limit_of(device.device_kind, device.platform, options.bandwidth)
    return {"device_kind": device.device_kind, "published_limit": limit}


def load(options: argparse.Namespace) -> tuple[model_config.ModelConfig, object]:
    """Returns the model and its weights, layers as rollout engines have them."""
    compile_cache.enable()
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
    """An engine's program for some rows, and a cache that it finds filled."""

    def __init__(
        self, cfg, params, options, context: int, temperature: float, batch: int = 1
    ):
        """Compiles it; no prompt is read, since no time hangs on what is cached."""
        self._params, self._steps = params, options.steps
        most = context + options.steps
        engine = engine_lib.Engine(
            cfg,
            engine_programs.EngineConfig(
                max_rows=batch,
                max_length=most,
                page_size=options.page_size,
                steps_per_call=options.steps,
                sampling_cfg=sampling.SamplingConfig(temperature),
                dtype=options.dtype,
            ),
        )
        engine.set_params(params, version=0)
        self._program = engine.pool.get(engine.programs.decoding(params, batch, None))
        self._cache = engine.pool.get(engine.programs.empty_caches())().target
        engine.pool.close()
        num_pages = engine.engine_cfg.max_pages
        pages = 1 + np.arange(batch * num_pages, dtype=np.int32)
        self._rows = decode.Rows(
            page_table=pages.reshape(batch, num_pages),
            lengths=np.full(batch, context, np.int32),
            pending=np.ones(batch, np.int32),
            keys=1 + np.arange(2 * batch, dtype=np.uint32).reshape(batch, 2) // 2,
            remaining=np.full(batch, most, np.int32),
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


def measure(
    options: argparse.Namespace,
    context: tuple[model_config.ModelConfig, object],
    cell: tables.Cell,
    published_limit: float | None,
    device_kind: str,
) -> list[tables.Row]:
    """Times decoding behind one context at one temperature."""
    (cfg, params), num_steps = context, options.steps
    decoder = Decoder(cfg, params, options, *cell.overrides.values())
    about = {"model": options.model, "dtype": options.dtype, "device": device_kind}
    needed = minimal_bytes(cfg, params, cell["context"] + 5 / 8 * num_steps)

    def take(name, case, number):
        before = published_limit or measured_limit()
        step_s, call_s = decoder.measure()
        limit = max(before, published_limit or measured_limit())
        row = about | {"minimal_bytes": needed, "limit_gb_per_s": limit / 1e9}
        row["call_tokens_per_s"] = num_steps / call_s
        # Noise can exceed what a few steps of a tiny model take.
        if step_s <= 0:
            return row | dict.fromkeys(("step_ms", "tokens_per_s", "bandwidth_frac"))
        return row | {
            "step_ms": 1e3 * step_s,
            "tokens_per_s": 1 / step_s,
            "bandwidth_frac": needed / step_s / limit,
        }

    return paired.run_paired(
        [SYSTEM], [cell.overrides], take, rounds=options.rounds, warmups=1
    )


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Adds to medians what was decoded."""
    summary = paired.summarise(
        rows, case_keys=CASE_KEYS, metrics=METRICS, reference=SYSTEM
    )
    about = ("model", "dtype", "device", "minimal_bytes")
    for row in summary:
        its = claims.only(rows, **{key: row[key] for key in CASE_KEYS})
        row |= {name: its[name] for name in about}
    return summary


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
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
    return fig


def _reaches_the_bandwidth(rows: claims.Rows) -> claims.Finding:
    """Decides by the temperature of rollouts, whose draws take noise."""
    found = tables.where(rows, temperature=1)
    shares = {row["context"]: row["bandwidth_frac/median"] for row in found}
    told = ", ".join(f"{share:.0%} at {n} cached" for n, share in shares.items())
    model, dtype, device = (found[0][name] for name in ("model", "dtype", "device"))
    return min(shares.values()) >= TARGET, f"{model}, {dtype}, {device}: {told}"


EXPERIMENT = experiment.Experiment(
    slug="decode_bandwidth",
    text=__doc__,
    title="plain decoding at batch 1 against the memory's bandwidth",
    larger=experiment.both(
        "--model=qwen2.5-7b --dtype=bfloat16 --contexts=512,8192 --steps=256"
    ),
    options=OPTIONS,
    check=check,
    settings=settings_of,
    context=load,
    cells=lambda options: [
        tables.Cell({"context": context, "temperature": temperature}, None)
        for context in experiment.numbers(options.contexts, "contexts")
        for temperature in experiment.numbers(
            options.temperatures, "temperatures", float
        )
    ],
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "plain decoding at batch 1 reaches 85 % of the memory's bandwidth (the "
        "target is of one H200, 7B in bf16)": _reaches_the_bandwidth,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
