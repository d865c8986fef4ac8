"""A rollout that is over, and its form in a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tlt_jax import types
from tlt_jax.rl import collector
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import experience
from tlt_jax.rl.workers import records

# What a checkpoint has of each completion's tokens: fields of `types.Completion`.
_BY_TOKEN = {"tokens": np.int32, "logprobs": np.float32, "was_drafted": np.bool_}


@dataclasses.dataclass(frozen=True)
class Rolled:
    """What the rollouts of one RL step brought, and what the record says of them.

    Attributes:
      row: values by metric name.
      everything: all that was sampled and judged.
      useful: the groups to train on; None: none carries signal.
      parts: what each of several reward functions said of each completion; or empty.
      intervals: what each worker did.
      lost: why workers are lost, by number.
      seconds: by stage; of a rollout beside an update, whose watch has none of it.
    """

    row: dict[str, Any]
    everything: experience.Experience
    useful: experience.Experience | None
    parts: Sequence[Mapping[str, float]]
    intervals: Sequence[records.Interval]
    lost: Mapping[int, str]
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what a resumed run learns from: fit for JSON, and arrays by name."""
        batch = self.everything
        if self.useful is not None:
            batch = batch.with_logprobs_of(self.useful)
        completions = batch.completions
        arrays = {
            "lengths": batch.lengths,
            "request_ids": np.array([c.request_id for c in completions], np.int64),
            "rewards": batch.rewards,
        }
        for name, dtype in _BY_TOKEN.items():
            each = [getattr(c, name) for c in completions]
            if not any(values is None for values in each):
                arrays[name] = np.concatenate(each).astype(dtype)
        if batch.routes is not None:
            arrays["num_routes"] = np.array([len(routes) for routes in batch.routes])
            arrays["routes"] = np.concatenate(batch.routes)
        told = {
            "row": {name: _plain(value) for name, value in self.row.items()},
            "prompts": [prompt.prompt_id for prompt in batch.prompts],
            "useful": self.useful and batch.places_of(self.useful),
            "finish_reasons": [c.finish_reason for c in completions],
            "parts": [dict(one) for one in self.parts],
            "intervals": [dataclasses.astuple(one) for one in self.intervals],
            "lost": dict(self.lost),
            "seconds": dict(self.seconds),
        }
        return told, arrays


def restored(
    told: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    prompts_of: Callable[[Sequence[int]], list[prompts.Prompt]],
) -> Rolled:
    """Make a rollout of its `state`; `prompts_of` finds prompts by their ids."""
    ends = np.cumsum(arrays["lengths"])[:-1]
    given = {name: np.split(arrays[name], ends) for name in _BY_TOKEN if name in arrays}
    if "routes" in arrays:
        passed = np.cumsum(arrays["num_routes"])[:-1]
        given["routes"] = np.split(arrays["routes"], passed)
    completions = [
        types.Completion(
            int(request_id),
            finish_reason=reason,
            **{name: each[i] for name, each in given.items()},
        )
        for i, (request_id, reason) in enumerate(
            zip(arrays["request_ids"], told["finish_reasons"], strict=True)
        )
    ]
    asked = prompts_of(told["prompts"])
    everything = experience.Experience(asked, completions, arrays["rewards"])
    useful = told["useful"]
    return Rolled(
        told["row"],
        everything,
        None if useful is None else everything.select(useful),
        told["parts"],
        [
            records.Interval(worker, records.Activity(activity), *times)
            for worker, activity, *times in told["intervals"]
        ],
        # JSON has made text of the numbers.
        {int(worker): reason for worker, reason in told["lost"].items()},
        told["seconds"],
    )


def of_collected(
    collected: collector.Collected,
    row: Mapping[str, Any],
    intervals: Sequence[records.Interval],
    lost: Mapping[int, str],
    seconds: Mapping[str, float],
) -> Rolled:
    """Sum a step's rollouts up; `row` is what others than the collector say of them."""
    scores = collected.scores
    return Rolled(
        collected.row() | dict(row),
        collected.everything,
        collected.useful,
        [one.parts for one in scores.items] if scores.names else (),
        intervals,
        dict(lost),
        dict(seconds),
    )


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers and arrays into Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value
