"""RL steps of a simulated cluster: rollout, then inference, update and weight sync."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments.simulation import cluster, cluster_records, costs, workload
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import build as tuners

# What is compared: the tuner's name, and whether idle workers train.
OFF, PAPER, OURS = "off", "threshold", "cost_model"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A cluster with its work: responses of an RL step by its number.

    `arms` are candidates of the tuner `cost_model`; `table` has one strategy for each
    number of rows, for the tuner `threshold`, which begins at `threshold` of a worker.
    `rest_s` are seconds after a rollout of so many tokens, prompts included: inference,
    update and sync. The drafter's state is that at the beginning.

    With `is_separate` the learner has devices of its own (`workers.placement`), which
    wait while the others roll out; `send_s` is what weights take to the workers, which
    wait for them. With a `lag` rollouts go on beside its updates by weights that are so
    many steps old (`rollout.lag`).
    """

    cfg: cluster_records.ClusterConfig
    costs: costs.Costs
    acceptance: workload.Acceptance
    arms: strategy_lib.Arms
    table: strategy_lib.Arms
    threshold: int
    responses: Callable[[int], Sequence[workload.Response]]
    rest_s: Callable[[int], float]
    drafter: cluster_records.Drafter = dataclasses.field(
        default_factory=cluster_records.Drafter
    )
    is_separate: bool = False
    send_s: float = 0.0
    lag: int = 0


class Line:
    """When rollouts and updates that go on side by side begin and end.

    The rollout of step s (from 0) needs the weights after step s - 1 - lag and the end
    of the rollout before; the update of step s its rollout and the update before.
    """

    def __init__(self, lag: int):
        """Begins at time 0, when there are the first weights."""
        self._lag, self._rolled_s = lag, 0.0
        self._updated_s = [0.0]

    def wait_s(self) -> float:
        """Returns how long workers wait for weights after the last rollout's end."""
        step = len(self._updated_s) - 1
        ready_s = self._updated_s[max(step - self._lag, 0)]
        return max(ready_s - self._rolled_s, 0.0)

    def step(self, rollout_s: float, rest_s: float) -> float:
        """Takes the next step; returns the seconds since the end of the one before."""
        self._rolled_s += self.wait_s() + rollout_s
        before_s = self._updated_s[-1]
        self._updated_s.append(max(self._rolled_s, before_s) + rest_s)
        return self._updated_s[-1] - before_s


def run(scenario: Scenario, system: str, num_steps: int, seed: int) -> list[dict]:
    """Takes RL steps with `OFF`, `PAPER` or `OURS`; returns a row for each.

    The tuner goes on learning over them; the seed is that of acceptance.

    Raises:
      ValueError: the system is unknown.
    """
    if system not in (OFF, PAPER, OURS):
        raise ValueError(f"system={system!r}: use one of {OFF}, {PAPER}, {OURS}.")
    on = system != OFF
    tuner = None
    if on:
        arms = scenario.arms if system == OURS else scenario.table
        tuner = tuners.build(
            system,
            arms,
            max_rows=scenario.cfg.max_rows,
            seed=seed,
            threshold=scenario.threshold,
        )
    simulated = cluster.Cluster(
        dataclasses.replace(scenario.cfg, trains=on),
        scenario.costs,
        scenario.acceptance if on else None,
        tuner,
        seed=seed,
        drafter=dataclasses.replace(scenario.drafter),
    )
    rows, line = [], Line(scenario.lag)
    for step in range(num_steps):
        if step > scenario.lag:
            simulated.changed_target()
        responses = scenario.responses(step)
        report = simulated.roll_out(responses)
        tokens = sum(r.prompt_tokens + r.num_tokens for r in responses)
        rest_s = scenario.rest_s(tokens)
        rollout_s = scenario.send_s + report.makespan_s
        step_s = rollout_s + rest_s
        if scenario.lag:
            step_s = line.step(rollout_s, rest_s)
            simulated.pass_time(line.wait_s() + scenario.send_s)
        else:
            simulated.pass_time(rest_s + scenario.send_s)
        idle_s = report.sums["workers/idle_s"]
        rows.append(
            {
                "system": system,
                "step": step,
                "step_s": step_s,
                "rollout_s": report.makespan_s,
                "rest_s": rest_s,
                "send_s": scenario.send_s,
                "learner_idle_frac": 1 - rest_s / step_s
                if scenario.is_separate
                else 0.0,
                "rollout_frac": report.makespan_s / step_s,
                "tokens": report.num_tokens,
                "accept_length": report.accept_length,
                "idle_frac": report.sums["workers/idle_frac"],
                "trained_of_idle": report.sums["workers/trained_s"] / idle_s
                if idle_s
                else 0.0,
                "drafter_steps": report.num_drafter_steps,
                "quality": simulated.drafter.quality,
                "preempted": report.num_preempted,
            }
        )
    return rows


def compare(
    scenario: Scenario,
    num_steps: int,
    seed: int,
    reference: Sequence[dict] | None = None,
) -> Iterator[tuple[str, dict]]:
    """Takes RL steps with each system; yields it and its totals.

    Those are beside the rows of a `reference`; None: everything off. With a lag the
    first steps, in which a rollout goes on beside no update, are left out.
    """
    for system in (OFF, PAPER, OURS):
        rows = run(scenario, system, num_steps + scenario.lag, seed)[scenario.lag :]
        reference = reference or rows
        yield system, totals(rows, reference)


def totals(rows: Sequence[dict], reference: Sequence[dict]) -> dict:
    """Sums a system's steps up beside those of everything off."""

    def total(which, name):
        return sum(row[name] for row in which)

    def mean(name):
        return float(np.mean([row[name] for row in rows]))

    step_s, rollout_s = total(rows, "step_s"), total(rows, "rollout_s")
    means = ("accept_length", "idle_frac", "trained_of_idle", "drafter_steps")
    means += ("send_s", "learner_idle_frac")
    return {
        "step_s": step_s / len(rows),
        "rollout_s": mean("rollout_s"),
        "rollout_frac": rollout_s / step_s,
        "times_faster": total(reference, "step_s") / step_s,
        "rollout_times_faster": total(reference, "rollout_s") / rollout_s,
        **{name: mean(name) for name in means},
        "drafter_quality": rows[-1]["quality"],
        "preempted": mean("preempted"),
    }
