"""Traces of real engines on disk: seconds of steps, and what drafts had accepted."""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.lab import experiment
from experiments.simulation import arm_replay
from tlt_jax.specdec import strategy as strategy_lib

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Of the experiments that replay one.
OPTION = experiment.Option(
    "trace",
    None,
    "default: your own tuner_trace.jsonl beside --out, else that of record",
    pathlib.Path,
    recorded=False,
)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was measured once and can be replayed under any tuner.

    `lifetimes` are by drafter and then by text, `[n] int` as `arm_replay.Text` has
    them, cut at `max_levels`; `step_s` are those of `arm_replay.Machine`.
    """

    step_s: Mapping[arm_replay.Kind, tuple[float, ...]]
    lifetimes: Mapping[str, Sequence[np.ndarray]]
    max_levels: int


def write(trace: Trace, path: pathlib.Path) -> None:
    """Writes a line of JSON for each kind of step and for each text."""
    lines: list[dict] = [{"kind": "trace", "max_levels": trace.max_levels}]
    for bucket, strategy in sorted(
        trace.step_s, key=lambda kind: (kind[0], str(kind[1]))
    ):
        line = {"kind": "steps", "bucket": bucket}
        line["strategy"] = None if strategy is None else str(strategy)
        line["step_s"] = [round(s, 6) for s in trace.step_s[bucket, strategy]]
        lines.append(line)
    for drafter, texts in trace.lifetimes.items():
        for number, text in enumerate(texts):
            line = {"kind": "text", "drafter": drafter, "text": number}
            lines.append(line | {"lifetimes": "".join(_DIGITS[n] for n in text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def given(options: argparse.Namespace) -> Trace:
    """Reads the trace that the options name; once.

    Raises:
      ValueError: there is none.
    """
    path = path_of(options)
    if not path.is_file():
        raise ValueError(
            f"--trace={path} is no file: make one with python -m "
            "experiments.tuner_trace, or name another."
        )
    return read(path)


def path_of(options: argparse.Namespace) -> pathlib.Path:
    """Returns where the trace lies that the options name."""
    return options.trace or experiment.find(options, "tuner_trace.jsonl")


@functools.cache
def read(path: pathlib.Path) -> Trace:
    """Reads what `write` wrote.

    Raises:
      ValueError: it is no trace.
    """
    step_s, lifetimes, max_levels = {}, {}, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        match row.get("kind"):
            case "trace":
                max_levels = row["max_levels"]
            case "steps":
                text = row["strategy"]
                strategy = None if text is None else strategy_lib.parse(text)
                step_s[row["bucket"], strategy] = tuple(row["step_s"])
            case "text":
                digits = [_DIGITS.index(digit) for digit in row["lifetimes"]]
                lifetimes.setdefault(row["drafter"], []).append(np.array(digits, int))
            case other:
                raise ValueError(
                    f"{path} has a line of kind {other!r}: name a file that "
                    "experiments.tuner_trace wrote."
                )
    return Trace(step_s, lifetimes, max_levels)
