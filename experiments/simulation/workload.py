"""What a simulated rollout has to generate: lengths, and how drafts fare.

Lengths come from a law (long-tailed by default) or from a run's own `rollouts/`; either
way a response is as long as it is whatever decodes it, as in the real system.
"""

import bisect
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tlt_jax.specdec import strategy as strategy_lib


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A text of a real run: the places, in order, of tokens that no draft guessed."""

    num_tokens: int
    missed: tuple[int, ...]

    def accepted(self, start: int, depth: int, num_steps: int) -> list[int]:
        """Returns what each step from `start` on has accepted: all up to the next miss.

        A text that was shorter than what is asked for begins again. Steps after
        `num_steps` tokens, where a call ends, have 0.
        """
        found, limit = [0] * num_steps, start + num_steps
        for step in range(num_steps):
            place = start % self.num_tokens
            following = bisect.bisect_left(self.missed, place)
            stop = self.num_tokens
            if following < len(self.missed):
                stop = self.missed[following]
            found[step] = min(stop - place, depth)
            start += found[step] + 1
            if start >= limit:
                break
        return found


@dataclasses.dataclass(frozen=True)
class Response:
    """One completion to come, of at least one token.

    Responses with the same number of the prompt share its pages. `drafted` tells how
    drafts fare in it, where that is known of it; None: as in all.
    """

    prompt: int
    prompt_tokens: int
    num_tokens: int
    drafted: Drafted | None = None


class Acceptance:
    """How many drafted tokens are accepted, by strategy and drafter.

    A step's accepted drafts are drawn by hazards: at depth d the chance that the path
    goes on. A drafter's `quality` between 0 (as it was) and 1 (adapted) mixes two sets
    of hazards.
    """

    def __init__(
        self,
        adapted: Mapping[strategy_lib.Strategy | None, Sequence[float]],
        stale: Mapping[strategy_lib.Strategy | None, Sequence[float]] | None = None,
    ):
        """Holds conditional chances by depth; beyond the last that one's.

        The key None serves every strategy that is not named. `stale` is of a drafter
        that was left behind; None: as adapted.

        Raises:
          ValueError: a chance is no probability, or there is none.
        """
        self._adapted, self._stale = dict(adapted), dict(stale or adapted)
        for hazards in (*self._adapted.values(), *self._stale.values()):
            if not hazards or not all(0 <= h <= 1 for h in hazards):
                raise ValueError(
                    f"hazards={tuple(hazards)}: give at least one chance, 0 to 1."
                )
        self._known: dict[tuple[strategy_lib.Strategy, float], np.ndarray] = {}

    def survival(
        self, strategy: strategy_lib.Strategy, quality: float = 1.0
    ) -> np.ndarray:
        """Returns the chance that at least d drafts are accepted, d from 1 on."""
        key = strategy, round(quality, 2)
        if key not in self._known:
            levels = np.arange(strategy.draft_depth)
            parts = []
            for table in (self._adapted, self._stale):
                hazards = table.get(strategy, table.get(None))
                if hazards is None:
                    raise ValueError(
                        f"strategy {strategy} has no acceptance: name it, or give one "
                        "for all."
                    )
                parts.append(np.take(hazards, levels, mode="clip"))
            mixed = key[1] * parts[0] + (1 - key[1]) * parts[1]
            self._known[key] = np.cumprod(mixed)
        return self._known[key]


def hazard_of(accept_length: float, depth: int) -> float:
    """Returns the constant hazard with which `depth` levels give an accept length.

    Raises:
      ValueError: the accept length is out of what the depth allows.
    """
    if not 1 <= accept_length <= depth + 1:
        raise ValueError(
            f"accept_length={accept_length:g} cannot come of draft_depth={depth}: it "
            f"is between 1 and {depth + 1}."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(middle**level for level in range(depth + 1))
        low, high = (middle, high) if total < accept_length else (low, middle)
    return (low + high) / 2


def log_normal(
    rng: np.random.Generator, count: int, *, median: float, sigma: float, most: int
) -> np.ndarray:
    """Draws lengths, `[count] int`, cut at `most` as a length limit cuts them."""
    lengths = median * np.exp(sigma * rng.normal(size=count))
    return np.clip(np.round(lengths), 1, most).astype(int)


def grouped(
    lengths: Sequence[int],
    group_size: int,
    prompt_tokens: int,
    drafted: Sequence[Drafted | None] = (),
) -> list[Response]:
    """Makes responses of lengths, `group_size` to a prompt."""
    known = drafted or [None] * len(lengths)
    return [
        Response(i // group_size, prompt_tokens, int(n), own)
        for i, (n, own) in enumerate(zip(lengths, known, strict=True))
    ]


def read_rollouts(workdir: pathlib.Path) -> dict[int, list[Drafted]]:
    """Reads the completions of a run, by RL step, in order of the requests.

    Raises:
      ValueError: there are none, or a line is not of a rollout.
    """
    found = {}
    paths = sorted((pathlib.Path(workdir) / "rollouts").glob("step_*.jsonl"))
    for path in paths:
        texts = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                total = int(row["num_tokens"])
                guessed = {i for span in row.get("drafted", ()) for i in range(*span)}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path.name}, line {number} is no completion's record "
                    f"({type(error).__name__}: {error}): give a workdir of "
                    "tlt_jax.main."
                ) from None
            missed = tuple(i for i in range(total) if i not in guessed)
            texts.append(Drafted(total, missed))
        found[int(path.stem.removeprefix("step_"))] = texts
    if not any(found.values()):
        raise ValueError(
            f"{workdir} has no rollouts/step_*.jsonl with completions: give a workdir "
            "of tlt_jax.main that ran with log.rollouts_every above 0."
        )
    return found


def read_lengths(workdir: pathlib.Path) -> dict[int, list[int]]:
    """Reads the completions' lengths of a run, as `read_rollouts` its texts."""
    return {
        step: [text.num_tokens for text in texts]
        for step, texts in read_rollouts(workdir).items()
    }


def tail(lengths: Sequence[int]) -> dict[str, float]:
    """Sums a length distribution up."""
    values = np.asarray(lengths, float)
    ordered = np.sort(values)
    longest = max(len(ordered) // 100, 1)
    return {
        "length/mean": float(values.mean()),
        "length/p50": float(np.percentile(values, 50)),
        "length/p95": float(np.percentile(values, 95)),
        "length/max": float(values.max()),
        "length/max_by_median": float(values.max() / max(np.median(values), 1)),
        "length/log_std": float(np.std(np.log(values))) if len(values) > 1 else 0.0,
        "length/longest_percent_tokens": float(
            ordered[-longest:].sum() / ordered.sum()
        ),
        "length/cut_frac": math.nan
        if len(values) < 2
        else float(np.mean(values == values.max())),
    }
