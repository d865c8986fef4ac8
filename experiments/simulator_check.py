"""The simulator against recorded runs: makespans predicted from other steps' costs.

    python -m experiments.simulator_check --scale=cpu
    python -m experiments.simulator_check --scale=cpu --workdirs=off=DIR,frozen=DIR,...

Three runs of `experiments.end_to_end` on two cores (SmolLM2-135M, two workers of one
core and two rows each; everything off, a frozen drafter, everything on) are simulated
RL step by RL step, by one cluster and one tuner from the first step to the last.
Rollouts are compared, compilation left out; update and sync are not. The first RL step,
in which programs compile and the tuner tries plain decoding, is simulated and not
compared. `given` says what the simulator is told of the step that it predicts:

- `lengths`: how long each response is. Calibrated on the other RL steps of the run:
  what decoding at one and at two rows takes, a prompt's token, a finished response, a
  drafter's step, examining and publishing it; and how drafts fare, by drawing for each
  response one of the other steps' that ended alike (at the limit, or before, at about
  the same length). So no step helps to predict itself.
- `drafts`: also which tokens of each response a draft had guessed.
- `speed`: also one factor, how fast the machine was during this step: the seconds that
  it spent decoding in those that its decode steps take at the other steps' speed. The
  machine is a shared one: plain decode steps of one run took between 20 and 34 ms.

What is off with `lengths` and not with `drafts` is what drafts will bring, which
nobody knows before; what is off with `drafts` and not with `speed` is the machine; and
what is off with all is the simulator.

With `--workdirs` the runs are read from there and written down beside the results.
Without it your own of an earlier call are taken up, else those of record.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import statistics

import numpy as np

from experiments.lab import claims, experiment, plotting, tables
from experiments.simulation import cluster, cluster_records, costs, recorded, workload
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import build as tuners

TOLERANCE = 0.10
SYSTEMS = ("off", "frozen", "tlt")
LENGTHS, DRAFTS, SPEED = GIVEN = ("lengths", "drafts", "speed")
# Of the recipe that was recorded.
GROUP_SIZE, PROMPT_TOKENS, MAX_NEW_TOKENS = 8, 160, 512
STRATEGY = strategy_lib.Strategy(7, 1, 8)
SIZES = {
    "num_workers": 2,
    "workers_per_place": 2,
    "max_rows": 2,
    "num_pages": 26,
    "page_size": 64,
    "steps_per_call": 32,
    "max_new_tokens": MAX_NEW_TOKENS,
}
# What is simulated, and what the run recorded of it.
_OBSERVED = {
    "rollout_s": "time/rollout_s",
    "decode_steps": "rollout/decode_steps",
    "idle_s": "workers/idle_s",
    "trained_s": "workers/trained_s",
    "drafter_steps": "drafter/num_steps",
}
# Of seconds at one row in those at two; the best is found by the workers' idle time.
RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def check(options: argparse.Namespace) -> None:
    """Other runs make another table."""
    options.again = options.again or bool(options.workdirs)


def file_of(system: str) -> str:
    """Names the file of a recorded run."""
    return f"simulator_check_{system}.jsonl"


def read_runs(options: argparse.Namespace) -> dict[str, list[recorded.Step]]:
    """Reads the recorded runs, or writes them down first.

    Raises:
      ValueError: `--workdirs` names something else than the systems.
    """
    given = experiment.parse_pairs(options.workdirs, "workdirs")
    unknown = [name for name in given if name not in SYSTEMS]
    if unknown or (given and len(given) < len(SYSTEMS)):
        raise ValueError(
            f"--workdirs={options.workdirs}: name {'=DIR,'.join(SYSTEMS)}=DIR, all of "
            "experiments.end_to_end."
        )
    for system, folder in given.items():
        steps = recorded.from_workdir(pathlib.Path(folder))
        options.out.mkdir(parents=True, exist_ok=True)
        recorded.write(steps, options.out / file_of(system))
    return {
        system: recorded.read(experiment.find(options, file_of(system)))
        for system in SYSTEMS
    }


def simulate(
    system: str,
    steps: list[recorded.Step],
    tables: list[costs.TableCosts],
    drafted: list[list[list[workload.Drafted]]],
    seed: int,
) -> list[tables.Row]:
    """Simulates the rollouts of a run's steps, one after the other.

    Each step has its own table of costs and, by round, how drafts fare in the texts.
    """
    tuner = acceptance = None
    if system != "off":
        # All responses are known; so nothing is drawn of this.
        acceptance = workload.Acceptance({None: (1.0,)})
        arms = strategy_lib.Arms(((SIZES["max_rows"], (STRATEGY,)),))
        tuner = tuners.build("cost_model", arms, max_rows=SIZES["max_rows"], seed=seed)
    cfg = cluster_records.ClusterConfig(**SIZES, trains=system == "tlt")
    simulated = cluster.Cluster(cfg, tables[0], acceptance, tuner, seed=seed)
    rows = []
    for step, table, texts in zip(steps, tables, drafted, strict=True):
        simulated.costs = table
        row = collections.Counter()
        for number, lengths in enumerate(step.rounds):
            known = texts[number] if texts else ()
            report = simulated.roll_out(
                workload.grouped(lengths, GROUP_SIZE, PROMPT_TOKENS, known)
            )
            row["rollout_s"] += report.makespan_s
            row["decode_steps"] += report.num_steps
            row["idle_s"] += report.sums["workers/idle_s"]
            row["trained_s"] += report.sums["workers/trained_s"]
            row["drafter_steps"] += report.num_drafter_steps
        rows.append(dict(row))
        simulated.changed_target()
    return rows


def _strategy(system: str) -> strategy_lib.Strategy | None:
    return None if system == "off" else STRATEGY


def table_of(
    system: str,
    steps: list[recorded.Step],
    ratio: float,
    plain: costs.TableCosts | None = None,
) -> costs.TableCosts:
    """Calibrates costs on steps; those of plain steps are of a run with all off."""
    table = recorded.calibrated(steps, _strategy(system), ratio)
    if plain is not None:
        table = dataclasses.replace(table, steps={**plain.steps, **table.steps})
    return table


def at_its_speed(
    table: costs.TableCosts, system: str, step: recorded.Step
) -> costs.TableCosts:
    """Returns the costs of a machine as fast as it was during the step."""
    one_s, two_s = (table.steps[rows, _strategy(system)] for rows in (1, 2))
    expected_s = recorded.decode_s(step, one_s, two_s)
    return table.times(step.values["rollout/decode_s"] / expected_s)


def others_of(steps: list[recorded.Step]) -> list[list[recorded.Step]]:
    """Returns for each step all others that are compared: all but the first."""
    return [[other for other in steps[1:] if other is not step] for step in steps]


def ratios(
    system: str, steps: list[recorded.Step], plain: costs.TableCosts | None
) -> list[float]:
    """Estimates seconds at one row, in those at two, for each step from the others.

    How much of the decoding's seconds was spent at one row is not recorded. But workers
    decode one row when there are no more, and so the other worker waits the longer, the
    more that takes: with drafts and speed as they were, the ratio is taken that makes
    the squared error of the other steps' idle time least.
    """
    errors = []
    for ratio in RATIOS:
        tables = [
            at_its_speed(table_of(system, others, ratio, plain), system, step)
            for step, others in zip(steps, others_of(steps), strict=True)
        ]
        found = simulate(system, steps, tables, [s.drafted for s in steps], 0)
        errors.append(
            [
                (row["idle_s"] - step.values["workers/idle_s"]) ** 2
                for row, step in zip(found, steps, strict=True)
            ]
        )
    table = np.asarray(errors)
    # The first step, which is not compared, is nowhere among the others.
    table[:, 0] = 0.0
    best = np.argmin(table.sum(axis=1, keepdims=True) - table, axis=0)
    return [RATIOS[n] for n in best]


class Runs:
    """The recorded runs by system; what plain steps cost by the one with all off."""

    def __init__(self, options: argparse.Namespace):
        """Reads them; see `read_runs`."""
        self.steps = read_runs(options)

    @functools.cached_property
    def plain(self) -> costs.TableCosts:
        """Costs of plain steps."""
        steps = self.steps["off"]
        return table_of("off", steps[1:], statistics.median(ratios("off", steps, None)))


def compare(
    system: str,
    steps: list[recorded.Step],
    plain: costs.TableCosts | None,
    seeds: int,
) -> list[tables.Row]:
    """Predicts each step but the first from the others, with texts drawn by each seed.

    `plain`: costs of plain steps; None: those of the run itself.
    """
    others = others_of(steps)
    tables = [
        table_of(system, its, ratio, plain)
        for its, ratio in zip(others, ratios(system, steps, plain), strict=True)
    ]
    own_speed = [
        at_its_speed(table, system, step)
        for table, step in zip(tables, steps, strict=True)
    ]
    recorded_texts = [step.drafted for step in steps]
    known_of = [recorded.Texts(its, MAX_NEW_TOKENS) for its in others]
    rows = []
    for given in GIVEN:
        if system == "off" and given == DRAFTS:
            continue
        runs = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            texts = recorded_texts
            if given == LENGTHS and system != "off":
                texts = [
                    [known.draw(lengths, rng) for lengths in step.rounds]
                    for step, known in zip(steps, known_of, strict=True)
                ]
            chosen = own_speed if given == SPEED else tables
            runs.append(simulate(system, steps, chosen, texts, seed))
        for number, step in enumerate(steps[1:], 1):
            row: tables.Row = {"system": system, "given": given}
            row |= {"step": step.step, "responses": step.num_responses}
            for name, of_run in _OBSERVED.items():
                row[f"{name}/run"] = step.values.get(of_run, 0)
                row[name] = statistics.mean(run[number][name] for run in runs)
            row["ratio"] = row["rollout_s"] / row["rollout_s/run"]
            rows.append(row)
    return rows


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Sums makespans over the steps; each was predicted from the others."""
    summary = []
    for (system, given), its in tables.groups(rows, "system", "given").items():
        entry: tables.Row = {"system": system, "given": given, "steps": len(its)}
        for name in ("rollout_s", "decode_steps", "idle_s", "trained_s"):
            entry[f"{name}/run"] = sum(r[f"{name}/run"] for r in its)
            entry[name] = sum(r[name] for r in its)
        entry["ratio"] = entry["rollout_s"] / entry["rollout_s/run"]
        entry["median_step_error"] = statistics.median(abs(r["ratio"] - 1) for r in its)
        entry["worst_step_error"] = max(abs(r["ratio"] - 1) for r in its)
        close = [abs(r["ratio"] - 1) <= TOLERANCE for r in its]
        entry["steps_within_tolerance"] = sum(close)
        entry["within_tolerance"] = abs(entry["ratio"] - 1) <= TOLERANCE
        summary.append(entry)
    return summary


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws simulated against recorded makespans, by what was given."""
    titles = {LENGTHS: "given: lengths", SPEED: "given: lengths, drafts, speed"}
    names = {"off": "everything off", "frozen": "a frozen drafter", "tlt": "all on"}
    fig, panels = plotting.panels(
        "Simulated against recorded rollouts, RL step by RL step",
        list(titles.values()),
        stamp,
        xlabel="recorded, seconds",
        ylabel="simulated, seconds",
    )
    seconds = [row[name] for row in rows for name in ("rollout_s/run", "rollout_s")]
    ends = [min(seconds) / 1.2, max(seconds) * 1.2]
    for axes, given in zip(panels, titles, strict=True):
        bounds = [[end * (1 + sign * TOLERANCE) for end in ends] for sign in (-1, 1)]
        axes.fill_between(ends, *bounds, color=plotting.PALE, label="within 10 %")
        for (system, name), color, marker in zip(
            names.items(), plotting.COLORS, "osx", strict=False
        ):
            its = tables.where(rows, system=system, given=given)
            both = (tables.column(its, n) for n in ("rollout_s/run", "rollout_s"))
            axes.plot(*both, marker, color=color, label=name)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([1, 2, 5, 10, 20, 40], list("125") + ["10", "20", "40"])
            axis.set_ticks([], minor=True)
    return fig


def _within_tolerance(rows: claims.Rows) -> claims.Finding:
    told = "; ".join(
        f"{r['system']}, given {r['given']}: {r['ratio']:.2f} "
        f"({r['steps_within_tolerance']} of {r['steps']} single RL steps, too)"
        for r in rows
    )
    return all(r["within_tolerance"] for r in rows), told


EXPERIMENT = experiment.Experiment(
    slug="simulator_check",
    text=__doc__,
    title="the simulator against recorded runs",
    options=(
        experiment.Option(
            "workdirs",
            "",
            "off=DIR,frozen=DIR,tlt=DIR: runs to write down and to check against",
            recorded=False,
        ),
        experiment.Option("seeds", 5),
    ),
    constants={"sizes": SIZES, "strategy": str(STRATEGY)},
    check=check,
    context=lambda options: Runs(options),
    cells=lambda: [tables.Cell({"system": system}, None) for system in SYSTEMS],
    measure=lambda options, context, cell: compare(
        cell["system"],
        context.steps[cell["system"]],
        None if cell["system"] == "off" else context.plain,
        options.seeds,
    ),
    summary=summary_of,
    plot=plot,
    claims={
        "simulated makespans are within 10 % of the recorded runs'": _within_tolerance,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
