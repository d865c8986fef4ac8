"""The texts that a drafter learns from: prompts, answers of the target, its features.

Texts are on disk some at a time; a killed process goes on with those that are missing.
A text is a function of the settings and its id alone. Long trainings take them in
rounds, so that the disk holds the texts of a few rounds, however many are written.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tlt_jax import types
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import chat, prompts
from tlt_jax.settings import drafter_run, schema, sections
from tlt_jax.specdec.texts import layout, shards

# Held-out texts have ids from here on, so that more training texts do not move them.
HELD_OUT = 1 << 40
# Seeds of the prompts of two rounds are so far apart.
_ROUND_SEEDS = 1_000_003
# A generator of reasoning-gym with a style and, perhaps, whole numbers as options.
_STYLED = re.compile(r"(\w+):(plain|cot|two_shot)((?:,\w+=-?\d+)*)")
_REQUESTS = {"chat": chat.ChatPrompts, "everyday": chat.EverydayPrompts}
_ABOUT = "about.json"
_SHARD_TEXTS = 32
# Texts that are answered together, in batches of the engine: few enough that a killed
# process repeats little, enough that the batch is seldom nearly empty.
_GROUP_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Which texts are trained on when.

    Attributes:
      num_texts: written for a round.
      num_steps: of a round; 0: there is only the first, without an end.
      kept: rounds whose texts are trained on at a time.
    """

    num_texts: int
    num_steps: int = 0
    kept: int = 1

    def place(self, step: int) -> tuple[int, int]:
        """Return the round of a step, and the steps of that round before it."""
        return divmod(step, self.num_steps) if self.num_steps else (0, step)

    def numbers(self, number: int) -> range:
        """Return the rounds whose texts are trained on in a round."""
        return range(max(number + 1 - self.kept, 0), number + 1)

    def text_ids(self, number: int) -> range:
        """Return the ids of the texts that are trained on in a round."""
        numbers = self.numbers(number)
        return range(numbers.start * self.num_texts, numbers.stop * self.num_texts)


def claim(directory: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Keep texts of other settings apart: they would be mixed without a word.

    `settings` are all that they depend on. The directory is made if it is not there.

    Raises:
      schema.ConfigError: the directory holds texts of other settings.
    """
    wanted = json.loads(json.dumps(settings))
    path = directory / _ABOUT
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if there.get(key) != value:
                raise schema.ConfigError(
                    f"{directory} holds texts made with {key}={there.get(key)}, not "
                    f"{value}: use another --workdir, or delete them."
                )
        return
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.new")
    partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def ask(
    settings: drafter_run.Texts,
    encode: Callable[[types.Example], np.ndarray],
    number: int = 0,
) -> list[types.Request]:
    """Choose the prompts, training ones first, of every task in turns.

    `number` is of the round; held-out prompts are the same in all.

    Returns:
      Requests of `num + num_held_out` texts, by their ids.

    Raises:
      ValueError: a task is unknown or has no prompt that is short enough.
    """
    asked = []
    for split, count, first_seed, first_id in (
        (
            "train",
            settings.num,
            settings.seed + number * _ROUND_SEEDS,
            number * settings.num,
        ),
        ("eval", settings.num_held_out, settings.seed, HELD_OUT),
    ):
        size = -(-count // len(settings.tasks))
        # A task that is named twice gives other prompts the second time.
        sets = [
            prompts.PromptSet(
                _task(name, first_seed + settings.tasks[:i].count(name), size).examples(
                    split
                ),
                encode,
                max_tokens=settings.max_prompt_tokens,
                long_prompts="skip",
            ).prompts
            for i, name in enumerate(settings.tasks)
        ]
        for i in range(count):
            turn, which = divmod(i, len(sets))
            chosen = sets[which][turn % len(sets[which])].tokens
            asked.append(request_of(first_id + i, chosen, settings.max_new_tokens))
    return asked


def task_of(name: str) -> str:
    """Return a source of prompts without the style and the numbers behind it."""
    styled = _STYLED.fullmatch(name)
    return styled.group(1) if styled else name


def request_of(text_id: int, prompt: np.ndarray, max_new_tokens: int) -> types.Request:
    """Ask for the text that a prompt begins; each has a prompt of its own."""
    return types.Request(text_id, text_id, 0, prompt, max_new_tokens)


def missing(asked: Sequence[types.Request], kept: shards.Shards) -> set[int]:
    """Return the ids of the texts that are not there yet."""
    return {request.request_id for request in asked} - set(kept.text_ids)


def write(
    engine: engine_lib.Engine,
    asked: Sequence[types.Request],
    kept: shards.Shards,
    *,
    seed: int,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Let the target answer the prompts that are not answered yet.

    Its pages keep the features beside the keys (`engine.capture`), so that texts cost
    no forward but their own. In last bits features depend on the texts that are decoded
    together. Prompts are therefore answered in fixed groups, and of a group that was
    begun by a killed process all are answered again.

    `engine` has the weights, draws at temperature 1 and captures; `on_progress` is
    called with texts done, texts in all, and tokens drawn.
    """
    size = max(_SHARD_TEXTS, _GROUP_ROUNDS * engine.engine_cfg.max_rows)
    num_tokens = 0

    def report(num_drawn):
        if on_progress:
            num_done = len(asked) - len(missing(asked, kept))
            on_progress(num_done, len(asked), num_tokens + num_drawn)

    for first in range(0, len(asked), size):
        group = asked[first : first + size]
        wanted = missing(group, kept)
        if wanted:
            num_tokens += _answer(engine, group, wanted, kept, seed, report)


def _answer(engine, requests, wanted, kept, seed, report) -> int:
    """Answer requests and keep the `wanted` texts; return the tokens drawn."""
    done: list[layout.Record] = []

    def keep(record):
        if record.text_id in wanted:
            done.append(record)
        if len(done) == _SHARD_TEXTS:
            flush()

    def flush():
        kept.append(done)
        done.clear()

    engine.check(requests)
    stats = engine.serve(
        request_queue.RequestQueue(requests).share(0),
        seed,
        on_completion=lambda completion: None,
        on_call=report,
        on_text=keep,
    )
    if done:
        flush()
    return stats.num_tokens


def _task(name: str, seed: int, size: int) -> tasks.Task:
    if name in _REQUESTS:
        return _REQUESTS[name](seed=seed, size=size, eval_size=size)
    options: dict[str, Any] = {}
    styled = _STYLED.fullmatch(name)
    if styled:
        name, options["style"], rest = styled.groups()
        pairs = (pair.split("=") for pair in rest.split(",")[1:])
        options |= {key: int(value) for key, value in pairs}
    task = sections.Task(name=name, options=options, seed=seed, size=size)
    return tasks.build(task, eval_size=size)
