"""The directory of a run: whose it is, and the completions written into it.

Its layout: `config.json`, `metrics.jsonl`, `rollouts/`, `checkpoints/`, `plots/`,
`tokenizer/`, `tensorboard/`.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

from tlt_jax import config, schema
from tlt_jax.rl import experience

# Settings that may change when a run is taken up again: none decides what is computed.
_FREE_ON_RESUME = ("log.", "checkpoint.", "eval.", "reward.workers", "reward.timeout_s")


def claim(workdir: pathlib.Path, run: config.RunConfig) -> None:
    """Write `config.json`, or check that the run it describes is this one.

    Args:
      workdir: made if it is not there.
      run: what is to be done there.

    Raises:
      schema.ConfigError: the directory holds a run with other settings.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if path.exists():
        _check_same(workdir, path, run)
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(config.to_json(run))
    temporary.replace(path)


def write_rollouts(
    workdir: pathlib.Path,
    step: int,
    batch: experience.Experience,
    decode_text: Callable[[Sequence[int]], str],
) -> None:
    """Write a step's completions to `rollouts/step_N.jsonl`, one line each."""
    directory = workdir / "rollouts"
    directory.mkdir(exist_ok=True)
    rewards = batch.rewards.reshape(-1)
    with open(directory / f"step_{step:06d}.jsonl", "w") as file:
        for i, completion in enumerate(batch.completions):
            prompt = batch.prompts[i // batch.group_size]
            record = {
                "example_id": prompt.example.example_id,
                "request_id": completion.request_id,
                "reward": float(rewards[i]),
                "num_tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
                "answer": prompt.example.answer,
                "text": decode_text(completion.tokens),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _check_same(
    workdir: pathlib.Path, path: pathlib.Path, run: config.RunConfig
) -> None:
    try:
        before = config.load(json.loads(path.read_text()))
    except ValueError as error:
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
