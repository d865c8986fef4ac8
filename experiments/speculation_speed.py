"""Speculative against plain decoding of the same tokens: how many times as fast.

    python -m experiments.speculation_speed --scale=cpu --drafter=WORKDIR

Each round decodes the same requests plainly and under every strategy, in turns, at
temperature 1 by default; filling the drafter's cache counts, prefill and compilation do
not. The bound beside a figure is what the accept length would give if drafting, noise
and bookkeeping cost nothing and the target's pass over the tree cost a plain step.
`noise_ms` is what the noise of a step's positions takes by itself, in a step of the
mean size: a batch shrinks as its answers end.

Target: at least twice plain decoding at batch 1 on CPU.
"""

import argparse
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax
from matplotlib import axes as axes_lib

from experiments.lab import harness, plotting, speculation_harness
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.specdec import noise
from tlt_jax.specdec import strategy as strategy_lib

SLUG = "speculation_speed"
PLAIN = "plain"
CASES = (
    *("1:D3K1V4", "1:D7K1V8", "1:D11K1V12", "1:D15K1V16"),
    *("2:D7K1V8", "4:D7K1V8", "8:D7K1V8", "16:D7K1V8"),
    *("32:D3K1V4", "32:D7K1V8", "64:D3K1V4"),
)
# Rows that every engine's cache has room for, so that they share compiled programs.
CACHE_ROWS = 64
# Requests of a case: its batch, or so many one after the other.
FEWEST_REQUESTS = 8


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = speculation_harness.argument_parser(__doc__)
    parser.add_argument(
        "--cases", default=",".join(CASES), help="batch:strategy, by commas"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(arguments)


def parse_cases(text: str) -> dict[int, list[strategy_lib.Strategy]]:
    """Reads the strategies of each batch size."""
    cases: dict[int, list] = {}
    for entry in text.split(","):
        batch, _, strategy = entry.partition(":")
        cases.setdefault(int(batch), []).append(strategy_lib.parse(strategy))
    return cases


def measurement(engines: dict, requests: dict, tokens: dict):
    """Returns the function that decodes one batch under one strategy."""

    def measure(name: str, case: harness.Row, number: int) -> harness.Row | None:
        batch = case["batch"]
        engine = engines.get((batch, name))
        if engine is None:
            return None
        completions, stats = engine.run(requests[batch], 1000 + number)
        drawn = [completion.tokens.tolist() for completion in completions]
        reference = tokens.setdefault((batch, number), drawn)
        took = stats.decode_s + stats.fill_s
        return {
            "num_tokens": stats.num_tokens,
            "decode_s": stats.decode_s,
            "fill_s": stats.fill_s,
            "tokens_per_s": stats.num_tokens / took,
            "step_ms": 1e3 * stats.decode_s / stats.num_steps,
            "mean_rows": stats.num_row_steps / stats.num_steps,
            "accept_length": stats.accept_length,
            "rows_differing": sum(
                a != b for a, b in zip(drawn, reference, strict=True)
            ),
        }

    return measure


def noise_ms(
    num_positions: int, vocab_size: int, kernels: kernels_lib.Kernels
) -> float:
    """Times the noise of so many positions within a program, median of nine loops."""
    loops = 10
    keys = jnp.ones((num_positions, 2), jnp.uint32)
    positions = jnp.arange(num_positions)

    @jax.jit
    def draw():
        def step(i, total):
            made = noise.gumbel(keys, positions + i, vocab_size, kernels)
            # All of it is made, and kept, before a little of it is read.
            return total + jnp.sum(lax.optimization_barrier(made)[:, ::4096])

        return lax.fori_loop(0, loops, step, 0.0)

    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(draw())
        times.append((time.perf_counter() - started) / loops)
    return 1e3 * statistics.median(times[1:])


def add_bounds(rows: list[harness.Row], summary: list[harness.Row]) -> None:
    """Adds accept length, cost of a step in plain steps, and how many rows differ."""
    for entry in summary:
        same = [
            row
            for row in rows
            if row["batch"] == entry["batch"] and row["system"] == entry["system"]
        ]
        entry["accept_length"] = sum(r["accept_length"] for r in same) / len(same)
        plain = {
            row["round"]: row["step_ms"]
            for row in rows
            if row["batch"] == entry["batch"] and row["system"] == PLAIN
        }
        costs = sorted(row["step_ms"] / plain[row["round"]] for row in same)
        entry["mean_rows"] = sum(row["mean_rows"] for row in same) / len(same)
        entry["step_ms"] = sorted(row["step_ms"] for row in same)[len(same) // 2]
        entry["step_cost"] = costs[len(costs) // 2]
        entry["num_tokens"] = sum(row["num_tokens"] for row in same)
        entry["rows_differing"] = sum(row["rows_differing"] for row in same)
        if entry["system"] != PLAIN:
            # `summarise` states the advantage of the reference.
            entry["speedup"] = 1 / entry.pop("tokens_per_s/times")
            entry.pop("tokens_per_s/times_min")


def plot(summary: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws speedups and their bounds: at batch 1 by strategy, then by batch size."""
    chosen = [row for row in summary if row["system"] != PLAIN]
    fig, (left, right) = plotting.panels(
        "Speculation against plain decoding of the same tokens", 2, stamp
    )
    fewest = min(row["batch"] for row in chosen)
    few = [row for row in chosen if row["batch"] == fewest]
    _plot_bounded(left, [row["system"] for row in few], few)
    left.set_xlabel(f"strategy, at batch {fewest}")
    best: dict[int, harness.Row] = {}
    for row in chosen:
        other = best.setdefault(row["batch"], row)
        if row["speedup"] > other["speedup"]:
            best[row["batch"]] = row
    batches = sorted(best)
    names = [f"{batch}\n{best[batch]['system']}" for batch in batches]
    _plot_bounded(right, names, [best[batch] for batch in batches])
    right.set_xlabel("batch, and the best strategy at it")
    left.set_ylabel("times plain decoding")
    plotting.save(fig, path)


def _plot_bounded(axes: axes_lib.Axes, names: list[str], rows: list[harness.Row]):
    speedups = [row["speedup"] for row in rows]
    lengths = [row["accept_length"] for row in rows]
    places = range(len(names))
    axes.plot(places, lengths, "--", color=plotting.GREY, label="accept length (bound)")
    axes.plot(places, speedups, "o-", color=plotting.COLORS[0], label="measured")
    for place, value in zip(places, speedups, strict=True):
        axes.annotate(
            f"{value:.2f}",
            (place, value),
            xytext=(0, -6),
            textcoords="offset points",
            fontsize=8,
            va="top",
            ha="center",
        )
    axes.axhline(1, color=plotting.GREY, linewidth=0.8)
    axes.set_xticks(places, names, fontsize=8)
    axes.set_ylim(bottom=0)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    cases = parse_cases(options.cases)
    setting = speculation_harness.Setting(options)
    provenance = setting.provenance(
        SLUG,
        {
            "cases": options.cases,
            "temperature": options.temperature,
            "rounds": options.rounds,
        },
    )
    rows, tokens = [], {}
    for batch, strategies in cases.items():
        count = max(batch, FEWEST_REQUESTS)
        engines = {
            (batch, str(strategy) if strategy else PLAIN): setting.engine(
                batch, options.temperature, strategy, most_rows=max(CACHE_ROWS, *cases)
            )
            for strategy in (None, *strategies)
        }
        rows += harness.run_paired(
            [name for _, name in engines],
            [{"batch": batch}],
            measurement(engines, {batch: setting.requests(count)}, tokens),
            rounds=options.rounds,
            warmups=1,
        )
        for engine in engines.values():
            engine.pool.close()
            kernels = engine.programs.kernels
    summary = harness.summarise(
        rows,
        case_keys=("batch",),
        metrics={"tokens_per_s": "higher"},
        reference=PLAIN,
    )
    add_bounds(rows, summary)
    for row in summary:
        name = row["system"]
        most = 1 if name == PLAIN else strategy_lib.parse(name).max_accept_length
        num = round(row["mean_rows"] * most)
        row["noise_ms"] = noise_ms(num, setting.policy.config.vocab_size, kernels)
    harness.write_results(options, SLUG, rows, summary, provenance)
    out = harness.folder_of(options)
    plot(summary, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
