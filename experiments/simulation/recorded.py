"""Recorded runs: what a workdir tells of its rollouts, in a small file.

Of each RL step: the lengths of its responses by round (dynamic sampling takes several
rollouts), what was decoded in how many seconds, and what the workers did when.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.simulation import costs, workload
from tlt_jax import metrics, timeline
from tlt_jax.specdec import strategy as strategy_lib


@dataclasses.dataclass(frozen=True)
class Step:
    """One RL step's rollouts.

    Attributes:
      step: its number.
      rounds: lengths of the responses of each rollout.
      values: of the run's record, by name.
      starts: trainings begun, by the timeline.
      busy_s: seconds of all workers with requests.
    """

    step: int
    rounds: tuple[tuple[int, ...], ...]
    values: dict
    starts: int
    busy_s: float

    @property
    def num_responses(self) -> int:
        """Responses of all rounds."""
        return sum(map(len, self.rounds))


_KEPT = (
    *("rollout/decode_steps", "rollout/row_steps", "rollout/decode_s"),
    *("rollout/prefill_tokens", "rollout/prefill_s", "rollout/tokens"),
    *("time/rollout_s", "time/compile_s", "time/update_s", "time/sync_s"),
    *("workers/idle_s", "workers/trained_s"),
    *("drafter/num_steps", "drafter/train_s"),
    *("specdec/num_accepted", "specdec/num_tried", "specdec/strategy"),
)


def from_workdir(workdir: pathlib.Path) -> list[Step]:
    """Reads a run.

    Raises:
      ValueError: it has no rollouts, or steps of it lack records.
    """
    lengths = workload.read_lengths(workdir)
    spent = {record["step"]: record for record in timeline.read(workdir)}
    steps = []
    for row in metrics.read(workdir):
        if row["step"] not in lengths:
            continue
        found = lengths[row["step"]]
        rounds = int(row.get("rollout/rounds", 1))
        if len(found) % rounds:
            raise ValueError(
                f"step {row['step']} of {workdir} has {len(found)} completions in "
                f"{rounds} rounds: its rollouts are not whole."
            )
        each = len(found) // rounds
        intervals = [
            interval
            for worker in spent.get(row["step"], {"workers": []})["workers"]
            for interval in worker["intervals"]
        ]
        steps.append(
            Step(
                row["step"],
                tuple(tuple(found[i : i + each]) for i in range(0, len(found), each)),
                {name: row[name] for name in _KEPT if name in row},
                sum(state == timeline.TRAINING for state, _, _ in intervals),
                sum(b - a for state, a, b in intervals if state == timeline.BUSY),
            )
        )
    return steps


def write(steps: Sequence[Step], path: pathlib.Path) -> None:
    """Writes a line of JSON for each step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(step)) + "\n" for step in steps]
    path.write_text("".join(lines), encoding="utf-8")


def read(path: pathlib.Path) -> list[Step]:
    """Reads what `write` wrote.

    Raises:
      ValueError: it is no recorded run.
    """
    steps = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row["rounds"] = tuple(tuple(lengths) for lengths in row["rounds"])
            steps.append(Step(**row))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no recorded RL step ({error}): write it "
                "with experiments.simulator_check --workdirs."
            ) from None
    return steps


def step_seconds(
    steps: Sequence[Step], strategy: strategy_lib.Strategy | None
) -> dict[costs.Kind, float]:
    """Estimates seconds of a decode step at one and two rows by least squares.

    A run of two rows a worker has two batch buckets, and its record says how many steps
    each had: `row_steps` counts a step of bucket 2 twice. All steps are taken to be of
    one strategy. Relative errors are minimised.

    Raises:
      ValueError: the steps tell too little.
    """
    rows, right = [], []
    for step in steps:
        total = step.values["rollout/decode_steps"]
        twos = step.values["rollout/row_steps"] - total
        seconds = step.values["rollout/decode_s"]
        rows.append([(total - twos) / seconds, twos / seconds])
        right.append(1.0)
    matrix = np.asarray(rows)
    if len(steps) < 2 or np.linalg.matrix_rank(matrix) < 2:
        raise ValueError(
            f"{len(steps)} steps cannot tell the seconds at one row from those at two: "
            "calibrate with more."
        )
    found, *_ = np.linalg.lstsq(matrix, np.asarray(right), rcond=None)
    if min(found) <= 0:
        raise ValueError(f"a step would take {found} s at one and two rows.")
    return {(1, strategy): float(found[0]), (2, strategy): float(found[1])}


def calibrated(
    steps: Sequence[Step], strategy: strategy_lib.Strategy | None
) -> costs.TableCosts:
    """Makes a table of costs from steps of a run of two rows a worker."""

    def total(name):
        return sum(step.values.get(name, 0.0) for step in steps)

    drafter_steps = total("drafter/num_steps")
    starts = sum(step.starts for step in steps)
    working_s = total("rollout/decode_s") + total("rollout/prefill_s")
    # What compiling took stands in the workers' time and not in the rest.
    other_s = sum(step.busy_s for step in steps) - working_s
    responses = sum(step.num_responses for step in steps)
    return costs.TableCosts(
        steps=step_seconds(steps, strategy),
        prefill_token_s=total("rollout/prefill_s") / total("rollout/prefill_tokens"),
        finished_s=max(other_s, 0.0) / responses,
        drafter_s=total("drafter/train_s") / drafter_steps if drafter_steps else 0.0,
        start_s=max(total("workers/trained_s") - total("drafter/train_s"), 0.0)
        / max(starts, 1),
    )


def hazards(steps: Sequence[Step]) -> tuple[float, ...]:
    """Returns chances of acceptance by depth, over all steps."""
    depth = max(len(step.values["specdec/num_tried"]) for step in steps)
    accepted, tried = np.zeros(depth), np.zeros(depth)
    for step in steps:
        its = step.values["specdec/num_tried"]
        tried[: len(its)] += its
        accepted[: len(its)] += step.values["specdec/num_accepted"][1:]
    pairs = zip(accepted, tried, strict=True)
    return tuple(float(a / t) if t else 0.0 for a, t in pairs)


@dataclasses.dataclass(frozen=True)
class AcceptLengths:
    """Mean accept lengths of responses that end, and of those cut at the limit.

    Texts that find no end ramble, and drafts fare badly in them; since they are the
    longest, they decide when a rollout ends. One mean for all would hide that.
    """

    ended: float
    cut: float
    limit: int

    def of(self, lengths: Sequence[int]) -> list[float]:
        """Returns each response's."""
        return [self.cut if n >= self.limit else self.ended for n in lengths]

    def row_steps(self, step: Step) -> float:
        """Returns how many row-steps a step would have taken."""
        return sum(
            n / own
            for lengths in step.rounds
            for n, own in zip(lengths, self.of(lengths), strict=True)
        )

    def scaled_to(self, step: Step) -> "AcceptLengths":
        """Returns them in proportion, so that a step's row-steps are those recorded."""
        factor = self.row_steps(step) / step.values["rollout/row_steps"]
        return AcceptLengths(
            max(self.ended * factor, 1.0), max(self.cut * factor, 1.0), self.limit
        )


def accept_lengths(steps: Sequence[Step], limit: int, most: int) -> AcceptLengths:
    """Estimates accept lengths from steps' tokens and row-steps, by least squares.

    Args:
      steps: speculative ones.
      limit: length at which responses are cut.
      most: tokens of a step, which no mean exceeds.
    """
    rows = []
    for step in steps:
        lengths = np.concatenate([np.asarray(r) for r in step.rounds])
        cut = lengths[lengths >= limit].sum()
        num = step.values["rollout/row_steps"]
        rows.append([cut / num, (lengths.sum() - cut) / num])
    matrix = np.asarray(rows)
    found, *_ = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)
    # Where nothing was cut nothing is known of that: as of the others.
    ended = 1 / np.clip(found[1], 1 / most, 1.0)
    cut = 1 / np.clip(found[0], 1 / most, 1.0) if matrix[:, 0].any() else ended
    return AcceptLengths(float(ended), float(cut), limit)
