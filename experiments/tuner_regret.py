"""Regret of tuners against an oracle, on a recorded trace and under simulated drift.

    python -m experiments.tuner_regret --scale=cpu

Every tuner goes through the same rollouts (how a call is replayed, and what regret is,
says `experiments.simulation.arm_replay`), each an RL step of its own with a target and
a drafter that changed. Compared are plain decoding; one strategy always; the same one
from a threshold of rows on downwards, with hysteresis; a table by rows; BEG-MAB, as
published and with a window that forgets sooner; and our cost model. The recorded trace
is that of `experiments.tuner_trace`; on it the drafters change from the untrained to
the trained one, fall back once, and recover. Once more it is replayed with the trained
one alone.

Target: our regret is below half of BEG-MAB's on the recorded trace.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from experiments.lab import claims, experiment, plotting, tables
from experiments.simulation import arm_replay, simulated_arms, trace_file
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import build as tuners
from tlt_jax.specdec.tuners import cost_model, tuner

REFERENCE, FORGETFUL, OURS = "beg_mab", "beg_mab, window 20", "cost_model"
CPU_ARMS = ("1:D3K1V4,D7K1V8,D11K1V12,D15K1V16", "8:D3K1V4,D7K1V8,D11K1V12")
ACCELERATOR_ARMS = (
    "4:D3K1V4,D7K1V8,D11K1V12,D15K1V16",
    "16:D3K1V4,D7K1V8,D11K1V12",
    "64:D1K1V2,D3K1V4,D7K1V8",
)
# Of the drafters in a trace, by the part of the run that is over.
_SCHEDULE = ((0.0, 0), (0.1, 1), (0.2, 2), (0.3, 3), (0.6, 1), (0.7, 2), (0.8, 3))
_MEANS = ("times_oracle", "best_frac", "think_us")
_COLORS = dict(
    zip(
        (OURS, "table", FORGETFUL, REFERENCE, "static", "threshold", "plain"),
        plotting.COLORS,
        strict=True,
    )
)


@dataclasses.dataclass(frozen=True)
class World:
    """What tuners are replayed against: machine and rollouts, made by a seed.

    Every bucket's arms have `static`, the strategy for always, with which the threshold
    rule begins at `threshold` rows; `table` has one strategy by rows, chosen before.
    """

    name: str
    arms: tuple[str, ...]
    static: str
    threshold: int
    table: tuple[str, ...]
    make: Callable[[int], tuple[arm_replay.Machine, Sequence[arm_replay.Rollout]]]

    @property
    def max_rows(self) -> int:
        """Rows of the engine: the last entry's."""
        return strategy_lib.parse_arms(self.arms).entries[-1][0]

    def tuners(self, seed: int) -> dict[str, tuner.Tuner]:
        """Builds one of each."""
        sizes = {"max_rows": self.max_rows, "seed": seed}
        arms = strategy_lib.parse_arms(self.arms)
        always = strategy_lib.parse_arms((f"{self.max_rows}:{self.static}",))
        table = strategy_lib.parse_arms(self.table)
        return {
            "plain": tuners.build("static", strategy_lib.Arms(()), **sizes),
            "static": tuners.build("static", always, **sizes),
            "threshold": tuners.build(
                "threshold",
                always,
                threshold=self.threshold,
                hysteresis=self.threshold // 4,
                **sizes,
            ),
            "table": tuners.build("static", table, **sizes),
            REFERENCE: tuners.build(REFERENCE, arms, **sizes),
            FORGETFUL: tuners.build(REFERENCE, arms, window=20, **sizes),
            OURS: tuners.build(OURS, arms, **sizes),
        }


def recorded(
    trace: trace_file.Trace, options: argparse.Namespace, name: str = "recorded"
) -> World:
    """Makes the world of a trace: its first bucket's arms and the others'."""
    by_bucket: dict[int, list[strategy_lib.Strategy]] = {b: [] for b, _ in trace.step_s}
    drafted = [kind for kind in trace.step_s if kind[1] is not None]
    for bucket, strategy in sorted(drafted, key=lambda kind: kind[1].draft_depth):
        by_bucket[bucket].append(strategy)
    entries = [f"{b}:{','.join(map(str, by_bucket[b]))}" for b in sorted(by_bucket)]
    max_rows = max(by_bucket)
    widest = by_bucket[max_rows]
    middle, shallow = str(widest[len(widest) // 2]), str(widest[0])

    def make(seed):
        arms = strategy_lib.parse_arms(entries)
        machine = arm_replay.Machine(dict(trace.step_s), arms, max_rows)
        return machine, recorded_rollouts(trace, options, seed)

    few = max(max_rows // 4, 1)
    table = (f"{few}:{middle}", f"{max_rows}:{shallow}")
    return World(name, tuple(entries), middle, max_rows // 2, table, make)


def recorded_rollouts(
    trace: trace_file.Trace, options: argparse.Namespace, seed: int
) -> list[arm_replay.Rollout]:
    """Draws texts of the drafter that each part of the run has."""
    rng = np.random.default_rng((seed, 3))
    versions = [
        [arm_replay.Text(lifetimes) for lifetimes in texts]
        for texts in trace.lifetimes.values()
    ]
    rollouts = []
    for number in range(options.rollouts):
        over = number / options.rollouts
        (version,) = [v for start, v in _SCHEDULE if start <= over][-1:]
        texts = versions[min(version, len(versions) - 1)]
        chosen = rng.integers(len(texts), size=options.texts)
        changed = ("target", "drafter") if number else ()
        rollouts.append(arm_replay.Rollout(tuple(texts[i] for i in chosen), changed))
    return rollouts


def simulated(
    name: str,
    costs: simulated_arms.Costs,
    arms: tuple[str, ...],
    threshold: int,
    table: tuple[str, ...],
    options: argparse.Namespace,
) -> World:
    """Makes a world that is made up."""
    parsed = strategy_lib.parse_arms(arms)
    max_rows = parsed.entries[-1][0]

    def make(seed):
        machine = simulated_arms.machine(costs, parsed, seed)
        rollouts = simulated_arms.rollouts(
            simulated_arms.Drift(),
            num_rollouts=options.rollouts,
            num_texts=options.texts * max(max_rows // 8, 1),
            median_tokens=80,
            max_tokens=512,
            max_levels=max(s.draft_depth for s in parsed.strategies()),
            seed=seed,
        )
        return machine, rollouts

    return World(name, arms, "D7K1V8", threshold, table, make)


def worlds(options: argparse.Namespace) -> list[World]:
    """Lists what tuners are replayed against."""
    trace = trace_file.given(options)
    *_, trained = trace.lifetimes.items()
    settled = dataclasses.replace(trace, lifetimes=dict([trained]))
    return [
        recorded(trace, options),
        recorded(settled, options, "recorded, drafter as trained"),
        simulated(
            "simulated CPU",
            simulated_arms.CPU,
            CPU_ARMS,
            4,
            ("2:D7K1V8", "8:D3K1V4"),
            options,
        ),
        simulated(
            "simulated accelerator",
            simulated_arms.ACCELERATOR,
            ACCELERATOR_ARMS,
            32,
            ("16:D7K1V8", "64:D3K1V4"),
            options,
        ),
    ]


def measure(context: list[World], cell: tables.Cell) -> dict[str, list[tables.Row]]:
    """Replays all tuners; returns a row of each, and its regret after each rollout."""
    (world,) = [world for world in context if world.name == cell["world"]]
    machine, rollouts = world.make(cell.seed)
    oracle = list(arm_replay.replay(machine, rollouts, None, cell.seed))
    oracle_s = sum(choice.seconds for choice in oracle)
    rows, curves = [], []
    for name, made in world.tuners(cell.seed).items():
        timed = Timed(made)
        choices = list(arm_replay.replay(machine, rollouts, timed, cell.seed))
        total_s = sum(choice.seconds for choice in choices)
        about = {"world": world.name, "tuner": name, "seed": cell.seed}
        curves += [
            about | {"rollout": number, "regret_s": round(float(value), 3)}
            for number, value in enumerate(by_rollout(choices))
        ]
        best = [choice.call.strategy == choice.best for choice in choices]
        rows.append(
            about
            | {
                "num_calls": len(choices),
                "num_tokens": sum(choice.call.num_tokens for choice in choices),
                "regret_s": float(sum(choice.regret_s for choice in choices)),
                "total_s": total_s,
                "oracle_s": oracle_s,
                "times_oracle": total_s / oracle_s,
                "best_frac": float(np.mean(best)),
                "think_us": 1e6 * timed.seconds / len(choices),
            }
        )
    return {tables.ROWS: rows, "curves": curves}


class Timed:
    """A tuner whose own time on the host is taken."""

    def __init__(self, made: tuner.Tuner):
        """Wraps `made`."""
        self._made, self.seconds = made, 0.0
        self.changed = made.changed

    def choose(self, num_rows: int) -> strategy_lib.Strategy | None:
        """Lets it choose."""
        started = time.perf_counter()
        chosen = self._made.choose(num_rows)
        self.seconds += time.perf_counter() - started
        return chosen

    def record(self, call: tuner.Call) -> None:
        """Tells it."""
        started = time.perf_counter()
        self._made.record(call)
        self.seconds += time.perf_counter() - started


def by_rollout(choices: Sequence[arm_replay.Choice]) -> np.ndarray:
    """Adds regret up over rollouts, from 0 on."""
    numbers = [choice.rollout + 1 for choice in choices]
    return np.cumsum(np.bincount(numbers, [choice.regret_s for choice in choices]))


def summarise(rows: Sequence[tables.Row]) -> list[tables.Row]:
    """Reduces seeds to means; `of_beg_mab` is the ratio of regrets seed by seed."""
    regrets = {(r["world"], r["tuner"], r["seed"]): r["regret_s"] for r in rows}
    summary = []
    for (world, name), same in tables.groups(rows, "world", "tuner").items():
        ratios = [r["regret_s"] / regrets[world, REFERENCE, r["seed"]] for r in same]
        regret_s, total_s, *others = (
            float(np.mean(tables.column(same, key)))
            for key in ("regret_s", "total_s", *_MEANS)
        )
        summary.append(
            {
                "world": world,
                "tuner": name,
                "seeds": len(same),
                "regret_s": regret_s,
                "regret_frac": regret_s / total_s,
                "of_beg_mab": float(np.mean(ratios)),
                "of_beg_mab_max": max(ratios),
                **dict(zip(_MEANS, others, strict=True)),
            }
        )
    return summary


def plot(curves: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the regret over a run: the mean of the seeds, and their range."""
    names = tables.values(curves, "world")
    fig, panels = plotting.panels(
        "Regret against the oracle of each call",
        names,
        stamp,
        xlabel="rollouts",
        ylabel="regret, s",
    )
    for axes, world in zip(panels, names, strict=True):
        its = tables.where(curves, world=world)
        for name, color in _COLORS.items():
            drawn = [r for r in tables.where(its, tuner=name) if r["rollout"]]
            style = "--" if name == FORGETFUL else "-"
            look = {"color": color, "label": name if axes is panels[0] else None}
            plotting.line(
                axes, drawn, "rollout", "regret_s", style, has_range=True, **look
            )
        axes.set_yscale("log")
    return fig


EXPERIMENT = experiment.Experiment(
    slug="tuner_regret",
    text=__doc__,
    title="tuner against static, BEG-MAB and oracle",
    larger=experiment.both("--seeds=5"),
    options=(
        trace_file.OPTION,
        *experiment.plain(seeds=5, rollouts=30),
        experiment.Option("texts", 24, "of a rollout"),
    ),
    constants={"cost_model": dataclasses.asdict(cost_model.CostModelConfig())},
    context=worlds,
    cells=lambda options, context: [
        tables.Cell({"world": world.name}, seed)
        for world in context
        for seed in range(options.seeds)
    ],
    measure=measure,
    others=("curves",),
    sources=lambda options: [trace_file.path_of(options)],
    summary=summarise,
    plot=plot,
    claims={
        "less than half of BEG-MAB's regret on the recorded trace": claims.at_most(
            "of_beg_mab", 0.5, world="recorded", tuner=OURS
        ),
        "the same where nothing drifts": claims.at_most(
            "of_beg_mab", 0.5, world="recorded, drafter as trained", tuner=OURS
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
