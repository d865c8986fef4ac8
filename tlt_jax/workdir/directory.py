"""The directory of a run: whose it is, and the completions written into it.

Its layout: `config.json`, `config.yaml` (the same), `metrics.jsonl`, `timeline.jsonl`,
`rollouts/`, `checkpoints/`, `drafter_checkpoints/`, `spilled_texts/`, `plots/`,
`tokenizer/`, `tensorboard/`, `initial_model/` where the model was made on the spot, and
`processes/`, a folder for each process but the first.
"""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tlt_jax import config
from tlt_jax.rl.update import experience
from tlt_jax.rl.workers import records
from tlt_jax.runtime import failures
from tlt_jax.settings import schema, text
from tlt_jax.workdir import metrics

# Settings that may change when a run is taken up again: none decides what is computed.
_FREE_ON_RESUME = (
    *("log.", "checkpoint.", "eval.", "reward.workers", "reward.timeout_s"),
    *("workers.",),
)

_LOCK = ".lock"
TIMELINE = "timeline.jsonl"


class WorkdirError(failures.UserError):
    """The directory cannot be used."""


@contextlib.contextmanager
def claimed(
    workdir: pathlib.Path,
    run: Any,
    load: Callable[[Mapping[str, Any]], Any] = config.load,
) -> Iterator[None]:
    """Hold the directory for a run: no other process may work there meanwhile.

    It is made if it is not there. `config.json` is written, and `config.yaml` for
    people and for `--config`; the run that it describes must be this one if it has
    taken a step (a start that failed binds nobody). `load` makes a run of the plain
    values there.

    Raises:
      schema.ConfigError: the directory holds a run with other settings.
      WorkdirError: another process works there, or it cannot be written.
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = os.open(workdir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # Until it is closed, by us or by our end.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = workdir / "config.json"
        # Of a step there is a record before there is any checkpoint.
        record = workdir / metrics.FILE
        if path.exists() and record.exists() and record.stat().st_size > 0:
            _check_same(workdir, path, run, load)
        _write(path, config.to_json(run))
        _write(path.with_suffix(".yaml"), text.to_yaml(run))
    except BlockingIOError as error:
        raise WorkdirError(
            f"another process works in {workdir}: wait for it, end it, or use another "
            "--workdir."
        ) from error
    else:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Say what to do where a file cannot be written.

    Raises:
      WorkdirError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{path} could not be written ({error.strerror or error}): make room or "
            "give permission, then run the same command again; it resumes from the "
            "newest checkpoint."
        ) from error


def _write(path: pathlib.Path, content: str) -> None:
    with writing(path):
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text(content, "utf-8")
        temporary.replace(path)


def write_rollouts(
    workdir: pathlib.Path,
    step: int,
    batch: experience.Experience,
    decode_text: Callable[[Sequence[int]], str],
    parts: Sequence[Mapping[str, float]] = (),
) -> list[dict[str, Any]]:
    """Write a step's completions to `rollouts/step_N.jsonl`, one line each.

    `parts` are what each of several reward functions said of each completion, empty
    where one failed; without them lines have no `rewards`. `drafted` lists the runs of
    tokens that a draft had guessed, as `[first, end)` indices of `tokens`; null where
    it was not noted.

    Returns:
      What the lines say.
    """
    path = workdir / "rollouts" / f"step_{step:06d}.jsonl"
    records = []
    for i, completion in enumerate(batch.completions):
        example = batch.prompts[i // batch.group_size].example
        record = {
            "example_id": example.example_id,
            "request_id": completion.request_id,
            "reward": float(batch.rewards.flat[i]),
            "num_tokens": len(completion.tokens),
            "finish_reason": completion.finish_reason,
            "prompt": example.prompt,
            "answer": example.answer,
            "text": decode_text(completion.tokens),
            "tokens": [int(token) for token in completion.tokens],
            "drafted": _runs(completion.was_drafted),
        }
        if parts:
            record["rewards"] = dict(parts[i])
        records.append(record)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(lines)
    return records


def write_timeline(
    workdir: pathlib.Path,
    step: int,
    intervals: Sequence[records.Interval],
) -> None:
    """Append to `timeline.jsonl` what each worker did in a step's rollout.

    One line a step: `{"step", "workers": [{"worker", "intervals": [[activity, start_s,
    stop_s], ...]}, ...]}`, times counted from the rollout's beginning.
    """
    found = collections.defaultdict(list)
    for one in intervals:
        span = [str(one.activity), one.start_s, one.stop_s]
        found[one.worker].append(span)
    record = {
        "step": step,
        "workers": [{"worker": w, "intervals": found[w]} for w in sorted(found)],
    }
    path = workdir / TIMELINE
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _runs(flags: Sequence[bool] | None) -> list[list[int]] | None:
    """Return where runs of true values begin and end."""
    if flags is None:
        return None
    changes = np.diff(np.pad(np.asarray(flags, np.int8), 1))
    return np.flatnonzero(changes).reshape(-1, 2).tolist()


def _check_same(workdir: pathlib.Path, path: pathlib.Path, run: Any, load) -> None:
    try:
        before = load(dict(json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise schema.ConfigError(
            f"{path} cannot be read ({error}): restore it, or use another --workdir."
        ) from error
    changed = {
        key: values
        for key, values in config.differences(before, run).items()
        if key != "num_steps" and not key.startswith(_FREE_ON_RESUME)
    }
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise schema.ConfigError(
            f"{workdir} holds a run with {key}={old!r}, not {new!r}{more}: use another "
            "--workdir, or the same settings to resume."
        )
