"""The directory of a run: whose it is, and the completions written into it.

Its layout: `config.json`, `config.yaml` (the same), `inputs.json`, `metrics.jsonl`,
`timeline.jsonl`, `rollouts/`, `checkpoints/`, `drafter_checkpoints/`, `spilled_texts/`,
`plots/`, `tokenizer/`, `tensorboard/`, `initial_model/` where the model was made on the
spot, and `processes/`, a folder for each process but the first.
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
from tlt_jax.settings import schema, text
from tlt_jax.workdir import checkpoint, files, identity, metrics

_LOCK = ".lock"
TIMELINE = "timeline.jsonl"


@contextlib.contextmanager
def claimed(
    workdir: pathlib.Path,
    run: Any,
    load: Callable[[Mapping[str, Any]], Any] = config.load,
) -> Iterator[None]:
    """Hold the directory for a run: no other process may work there meanwhile.

    It is made if it is not there. `config.json` is written, and `config.yaml` for
    people and for `--config`, unless the run is complete; the run that it describes
    must be this one if it has taken a step (a start that failed binds nobody). `load`
    makes a run of the plain values there.

    Raises:
      schema.ConfigError: the directory holds a run with other settings, or one that has
        taken more steps.
      files.WorkdirError: another process works there, or it cannot be written.
    """
    with files.writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = os.open(workdir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # Until it is closed, by us or by our end.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        identity.check_settings(workdir, run, load)
        _check_reached(workdir, run.num_steps)
        files.remove_remains(workdir)
        if checkpoint.newest(workdir) != run.num_steps:
            with files.replacing(workdir / identity.SETTINGS) as file:
                file.write(config.to_json(run))
            with files.replacing(workdir / "config.yaml") as file:
                file.write(text.to_yaml(run))
    except BlockingIOError as error:
        raise files.WorkdirError(
            f"another process works in {workdir}: wait for it, end it, or use another "
            "--workdir."
        ) from error
    else:
        yield
    finally:
        os.close(lock)


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
    with files.writing(path):
        path.parent.mkdir(exist_ok=True)
    with files.replacing(path) as file:
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
    files.append_line(workdir / TIMELINE, json.dumps(record))


def _runs(flags: Sequence[bool] | None) -> list[list[int]] | None:
    """Return where runs of true values begin and end."""
    if flags is None:
        return None
    changes = np.diff(np.pad(np.asarray(flags, np.int8), 1))
    return np.flatnonzero(changes).reshape(-1, 2).tolist()


def _check_reached(workdir: pathlib.Path, num_steps: int) -> None:
    """Refuse a run of fewer steps than are done: records would be dropped."""
    rows = metrics.read(workdir) if (workdir / metrics.FILE).exists() else []
    reached = max([checkpoint.newest(workdir) or 0, *(row["step"] for row in rows)])
    if num_steps < reached:
        raise schema.ConfigError(
            f"num_steps={num_steps}, but the run in {workdir} has taken {reached} "
            f"steps: give --config.num_steps={reached} or more, or use another "
            "--workdir."
        )
