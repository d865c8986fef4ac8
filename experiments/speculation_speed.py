r"""Speculative against plain decoding of the same tokens: how many times as fast.

    python -m experiments.speculation_speed --scale=cpu \
        --drafter=workdirs/counting_drafter

Each round decodes the same requests plainly and under every strategy, in turns, at
temperature 1 by default; filling the drafter's cache counts, prefill and compilation do
not. The bound beside a figure is what the accept length would give if drafting, noise
and bookkeeping cost nothing and the target's pass over the tree cost a plain step.
`noise_ms` is what the noise of a step's positions takes by itself, in a step of the
mean size: a batch shrinks as its answers end.

The drafter of record is that of `configs/smollm2_drafter.py:counting`, trained by

    python -m tlt_jax.train_drafter --config=configs/smollm2_drafter.py:counting \
        --workdir=workdirs/counting_drafter

Target: at least twice plain decoding at batch 1 on CPU.
"""

import argparse
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax
from matplotlib import axes as axes_lib

from experiments.lab import (
    claims,
    experiment,
    paired,
    plotting,
    recipes,
    speculation_setting,
    tables,
)
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.specdec import noise
from tlt_jax.specdec import strategy as strategy_lib

PLAIN, TUNER = "plain", "tuner"
# Rows that share a budget stand behind those of which each has all its nodes.
CASES = (
    *("1:D7K1V8", "1:D11K1V12", "1:D15K1V16"),
    *("8:D7K1V8", "8:D7K1V8N40"),
    *("16:D7K1V8", "16:D7K1V8N32", "16:D7K1V8N48"),
    *("32:D3K1V4", "32:D7K1V8N64", "32:D7K1V8N96"),
    *("64:D3K1V4", "64:D7K1V8N96", "64:D7K1V8N128"),
)
# Rows that every engine's cache has room for, so that they share compiled programs.
CACHE_ROWS = 64
# Requests of a case: its batch, or so many one after the other.
FEWEST_REQUESTS = 8


def parse_cases(text: str) -> dict[int, list[strategy_lib.Strategy]]:
    """Reads the strategies of each batch size.

    Raises:
      ValueError: an entry is not of that form.
    """
    cases: dict[int, list] = {}
    for entry in text.split(","):
        batch, _, strategy = entry.partition(":")
        if not batch.isdigit():
            raise ValueError(
                f"--cases={text}: {entry!r} is not batch:strategy, for example "
                "8:D7K1V8."
            )
        cases.setdefault(int(batch), []).append(strategy_lib.parse(strategy))
    return cases


def check(options: argparse.Namespace) -> None:
    """Refuses cases that cannot be read, and a drafter that is not there."""
    parse_cases(options.cases)
    speculation_setting.check_drafter(options.drafter, options.scale)


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


def measure(
    options: argparse.Namespace,
    context: speculation_setting.Setting,
    cell: tables.Cell,
) -> list[tables.Row]:
    """Decodes one batch plainly and under its strategies, in turns."""
    batch, cases = cell["batch"], parse_cases(options.cases)
    requests = context.requests(max(batch, FEWEST_REQUESTS))
    make = functools.partial(
        context.engine, batch, options.temperature, most_rows=max(CACHE_ROWS, *cases)
    )
    engines = {str(s) if s else PLAIN: make(s) for s in (None, *cases[batch])}
    if len(cases[batch]) > 1:
        first, *others = cases[batch]
        engines[TUNER] = make(first, others=others)
        engines[TUNER].warm_up()
    tokens: dict[int, list] = {}

    def decode(name, case, number):
        completions, stats = engines[name].run(requests, 1000 + number)
        drawn = [completion.tokens.tolist() for completion in completions]
        reference = tokens.setdefault(number, drawn)
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

    rows = paired.run_paired(
        list(engines), [cell.overrides], decode, rounds=options.rounds, warmups=1
    )
    for (name,), its in tables.groups(rows, "system").items():
        engines[name].pool.close()
        most = 1
        if name != PLAIN:
            named = [s for s in cases[batch] if name in (TUNER, str(s))]
            most = max(s.max_accept_length for s in named)
        taken = noise_ms(
            round(statistics.mean(tables.column(its, "mean_rows")) * most),
            context.policy.config.vocab_size,
            engines[name].programs.kernels,
        )
        for row in its:
            row["noise_ms"] = taken
    return rows


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Adds accept length, cost of a step in plain steps, and how many rows differ."""
    summary = paired.summarise(
        rows,
        case_keys=("batch",),
        metrics={"tokens_per_s": "higher"},
        reference=PLAIN,
    )
    for entry in summary:
        batch = tables.where(rows, batch=entry["batch"])
        same = tables.where(batch, system=entry["system"])
        plain = {r["round"]: r["step_ms"] for r in tables.where(batch, system=PLAIN)}
        step_costs = sorted(row["step_ms"] / plain[row["round"]] for row in same)
        middle = len(same) // 2
        for name in ("accept_length", "mean_rows"):
            entry[name] = sum(tables.column(same, name)) / len(same)
        entry["step_ms"] = sorted(tables.column(same, "step_ms"))[middle]
        entry["step_cost"] = step_costs[middle]
        for name in ("num_tokens", "rows_differing"):
            entry[name] = sum(tables.column(same, name))
        if entry["system"] != PLAIN:
            # `summarise` states the advantage of the reference.
            entry["speedup"] = 1 / entry.pop("tokens_per_s/times")
            entry.pop("tokens_per_s/times_min")
        entry["noise_ms"] = same[0]["noise_ms"]
    return summary


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws speedups and their bounds: at batch 1 by strategy, then by batch size."""
    chosen = [row for row in summary if row["system"] != PLAIN]
    fig, (left, right) = plotting.panels(
        "Speculation against plain decoding of the same tokens", ["", ""], stamp
    )
    fewest = min(row["batch"] for row in chosen)
    few = [row for row in chosen if row["batch"] == fewest and row["system"] != TUNER]
    names, lengths = (tables.column(few, n) for n in ("system", "accept_length"))
    left.plot(names, lengths, "--", color=plotting.GREY, label="accept length (bound)")
    _plot_speedups(left, few, "measured", plotting.COLORS[0], names)
    left.set_xlabel(f"strategy, at batch {fewest}")
    left.set_ylabel("times plain decoding")
    kinds = {"all rows alike": [], "rows share a budget": [], "the tuner's choice": []}
    alike, sharing, tuned = kinds.values()
    for row in chosen:
        if row["system"] == TUNER:
            tuned.append(row)
        else:
            shares = strategy_lib.parse(row["system"]).shares(row["batch"])
            (sharing if shares else alike).append(row)
    for (label, its), color in zip(kinds.items(), plotting.COLORS, strict=False):
        by_batch = sorted(tables.groups(its, "batch").items())
        best = [max(rows, key=lambda row: row["speedup"]) for _, rows in by_batch]
        places = [math.log2(row["batch"]) for row in best]
        _plot_speedups(right, best, label, color, places, told=its is tuned)
    batches = sorted(set(tables.column(chosen, "batch")))
    right.set_xticks([math.log2(batch) for batch in batches], batches)
    right.set_xlabel("batch; of each kind the best strategy")
    return fig


def _plot_speedups(
    axes: axes_lib.Axes,
    rows: list[tables.Row],
    label: str,
    color: str,
    places: list,
    told: bool = True,
):
    speedups = tables.column(rows, "speedup")
    axes.plot(places, speedups, "o-", color=color, label=label)
    for place, value in zip(places, speedups, strict=True) if told else ():
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
    axes.set_ylim(bottom=0)


def _noise_is_cheap(rows: claims.Rows) -> claims.Finding:
    shares = [row["noise_ms"] / row["step_ms"] for row in rows]
    return max(shares) < 0.1, f"at most {max(shares):.1%}"


def _falls_with_batch(rows: claims.Rows) -> claims.Finding:
    found = {r["batch"]: r["speedup"] for r in tables.where(rows, system="D7K1V8")}
    first, last = found[min(found)], found[max(found)]
    told = f"D7K1V8: {first:.2f} at {min(found)}, {last:.2f} at {max(found)}"
    return first > last, told


def _the_tuner_pays(rows: claims.Rows) -> claims.Finding:
    found = {r["batch"]: r["speedup"] for r in tables.where(rows, system=TUNER)}
    if not found:
        return False, "no batch has several strategies"
    least = min(found, key=found.get)
    return found[least] >= 0.98, f"least at batch {least}: {found[least]:.2f}"


EXPERIMENT = experiment.Experiment(
    slug="speculation_speed",
    text=__doc__,
    title="speedup by batch and tokens verified",
    published="V16: 3.22 to 2.48, V64: 3.62 to 1.70 (batch 1 to 32)",
    needs=f"--drafter={recipes.COUNTING_DRAFTER}",
    before={recipes.TRAIN_COUNTING: 15},
    larger=experiment.models(
        "--cases=1:D10K8V16,8:D10K8V16,32:D10K8V16,1:D10K8V64,8:D10K8V64,32:D10K8V64"
    ),
    options=(
        *speculation_setting.OPTIONS,
        experiment.Option("cases", ",".join(CASES), "batch:strategy, by commas"),
        *experiment.plain(temperature=1.0, rounds=3),
    ),
    check=check,
    context=lambda options: speculation_setting.Setting(options),
    settings=lambda context: context.about(),
    cells=lambda options: [
        tables.Cell({"batch": batch}, None) for batch in parse_cases(options.cases)
    ],
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "no row's tokens differ from plain's": claims.all_zero(
            "rows_differing", "rows that differ"
        ),
        "at least 2 times plain decoding at batch 1 on a CPU": claims.at_least(
            "speedup", 2.0, batch=1, system="D11K1V12"
        ),
        "noise takes less than a tenth of a step, at every batch": _noise_is_cheap,
        "the tuner is nowhere below 0.98 of plain decoding": _the_tuner_pays,
        "paper: the gain falls with the batch": _falls_with_batch,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
