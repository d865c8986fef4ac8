"""Recorded runs: what a workdir tells of its rollouts, in a small file.

Of each RL step: the lengths of its responses by round (dynamic sampling takes several
rollouts), how drafts fared in them, what was decoded in how many seconds, and what the
workers did when.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.simulation import costs, workload
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.viz import timeline
from tlt_jax.workdir import metrics


@dataclasses.dataclass(frozen=True)
class Step:
    """One RL step's rollouts: the lengths of their responses, by round.

    And of each response the tokens that no draft had guessed; nothing of a run without.
    `starts` are trainings begun, by the timeline, `published` the drafter's versions
    that they gave to the engines, `busy_s` seconds of all workers with requests.
    """

    step: int
    rounds: tuple[tuple[int, ...], ...]
    missed: tuple[tuple[tuple[int, ...], ...], ...]
    values: dict
    starts: int
    published: int
    busy_s: float

    @property
    def num_responses(self) -> int:
        """Responses of all rounds."""
        return sum(map(len, self.rounds))

    @property
    def drafted(self) -> list[list[workload.Drafted]]:
        """How drafts fared, by round; of a run without any, no rounds."""
        return [
            list(map(workload.Drafted, lengths, missed))
            for lengths, missed in zip(self.rounds, self.missed, strict=False)
        ]


_KEPT = (
    *("rollout/decode_steps", "rollout/row_steps", "rollout/decode_s"),
    *("rollout/prefill_tokens", "rollout/prefill_s", "rollout/tokens"),
    *("time/rollout_s", "time/compile_s", "time/update_s", "time/sync_s"),
    *("workers/idle_s", "workers/trained_s"),
    *("drafter/num_steps", "drafter/train_s", "specdec/accept_length"),
)


def from_workdir(workdir: pathlib.Path) -> list[Step]:
    """Reads a run.

    Raises:
      ValueError: it has no rollouts, or steps of it lack records.
    """
    texts = workload.read_rollouts(workdir)
    spent = {record["step"]: record for record in timeline.read(workdir)}
    steps = []
    version: int | None = None
    for row in metrics.read(workdir):
        before, version = version, row.get("drafter/version")
        published = version - before if version and before is not None else 0
        if row["step"] not in texts:
            continue
        found = texts[row["step"]]
        num_rounds = int(row.get("rollout/rounds", 1))
        if len(found) % num_rounds:
            raise ValueError(
                f"step {row['step']} of {workdir} has {len(found)} completions in "
                f"{num_rounds} rounds: its rollouts are not whole."
            )
        each = len(found) // num_rounds
        rounds = [found[i : i + each] for i in range(0, len(found), each)]
        drafts = any(len(text.missed) < text.num_tokens for text in found)
        intervals = [
            interval
            for worker in spent.get(row["step"], {"workers": []})["workers"]
            for interval in worker["intervals"]
        ]
        steps.append(
            Step(
                row["step"],
                tuple(tuple(t.num_tokens for t in texts) for texts in rounds),
                tuple(tuple(t.missed for t in texts) for texts in rounds if drafts),
                {name: row[name] for name in _KEPT if name in row},
                sum(state == timeline.TRAINING for state, _, _ in intervals),
                published,
                sum(b - a for state, a, b in intervals if state == timeline.BUSY),
            )
        )
    return steps


def write(steps: Sequence[Step], path: pathlib.Path) -> None:
    """Writes a line of JSON for each step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(step) for step in steps]
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
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
            row["rounds"] = tuple(map(tuple, row["rounds"]))
            row["missed"] = tuple(
                tuple(map(tuple, texts)) for texts in row.get("missed", ())
            )
            steps.append(Step(**row))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no recorded RL step ({error}): write it "
                "with experiments.simulator_check --workdirs."
            ) from None
    return steps


def decode_s(step: Step, one_s: float, two_s: float) -> float:
    """Returns the seconds of a step's decode steps at one row and at two.

    A run of two rows a worker has two batch buckets, and its record says how many steps
    each had: `row_steps` counts a step of bucket 2 twice.
    """
    total = step.values["rollout/decode_steps"]
    twos = step.values["rollout/row_steps"] - total
    return (total - twos) * one_s + twos * two_s


def calibrated(
    steps: Sequence[Step], strategy: strategy_lib.Strategy | None, one_by_two: float
) -> costs.TableCosts:
    """Makes a table of costs from steps of a run of two rows a worker.

    All their decoding is taken to be of one strategy. `one_by_two`: seconds of a decode
    step at one row, in those at two.
    """

    def total(name):
        return sum(step.values.get(name, 0.0) for step in steps)

    two_s = total("rollout/decode_s") / sum(decode_s(s, one_by_two, 1.0) for s in steps)
    drafter_steps = total("drafter/num_steps")
    working_s = total("rollout/decode_s") + total("rollout/prefill_s")
    # What compiling took stands in the workers' time and not in the rest.
    other_s = sum(step.busy_s for step in steps) - working_s
    responses = sum(step.num_responses for step in steps)
    measured_s, sync_s = _around_training(steps)
    return costs.TableCosts(
        steps={(1, strategy): one_by_two * two_s, (2, strategy): two_s},
        prefill_token_s=total("rollout/prefill_s") / total("rollout/prefill_tokens"),
        finished_s=max(other_s, 0.0) / responses,
        measured_s=measured_s,
        drafter_s=total("drafter/train_s") / drafter_steps if drafter_steps else 0.0,
        sync_s=sync_s,
    )


def _around_training(steps: Sequence[Step]) -> tuple[float, float]:
    """Seconds of examining the drafter and of publishing it, by least squares.

    Trainings last longer than their steps: an RL step's first one examines the drafter
    before, and those with steps publish it afterwards.
    """
    its = [step for step in steps if step.starts]
    if not its:
        return 0.0, 0.0
    matrix = np.asarray([[1.0, step.published] for step in its])
    spent_s = [s.values["workers/trained_s"] - s.values["drafter/train_s"] for s in its]
    measured_s, sync_s = np.linalg.lstsq(matrix, np.asarray(spent_s), rcond=None)[0]
    return max(float(measured_s), 0.0), max(float(sync_s), 0.0)


class Texts:
    """How drafts fared in the texts of recorded steps, to be drawn from by length.

    Texts that find no end ramble, and drafts fare badly in them; since they are the
    longest, they decide when a rollout ends. So for one that is cut at the limit one is
    drawn that was; for one that ends, one of about its length: short ones end before
    anything can be drafted.
    """

    def __init__(self, steps: Sequence[Step], limit: int, num_nearest: int = 8):
        """Keeps the texts of a run that drafted, cut at `limit` tokens.

        One is drawn of the `num_nearest` texts of nearest length.
        """
        texts = [text for step in steps for texts in step.drafted for text in texts]
        ended = [text for text in texts if text.num_tokens < limit]
        # Where nothing was cut nothing is known of that: as of the longest.
        self._cut = [text for text in texts if text.num_tokens >= limit] or ended
        self._ended = ended or texts
        self._limit, self._num_nearest = limit, num_nearest

    def draw(
        self, lengths: Sequence[int], rng: np.random.Generator
    ) -> list[workload.Drafted]:
        """Draws a text for each length."""
        found = []
        for length in lengths:
            pool = self._cut if length >= self._limit else self._ended
            distance = np.abs([text.num_tokens - length for text in pool])
            last = np.sort(distance)[: self._num_nearest][-1]
            nearest = np.flatnonzero(distance <= last)
            found.append(pool[int(rng.choice(nearest))])
        return found
