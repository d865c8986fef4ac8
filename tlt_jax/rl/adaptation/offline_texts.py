"""The texts that a drafter learns from: prompts, answers of the target, its features.

Every finished group of texts is on disk before the next; a killed process goes on with
the texts that are missing. A text is a function of the settings and its id alone.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import policy, types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models import transformer
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import chat, prompts
from tlt_jax.settings import drafter_run, schema, sections
from tlt_jax.specdec import noise
from tlt_jax.specdec.texts import shards

# Held-out texts have ids from here on, so that more training texts do not move them.
HELD_OUT = 1 << 40
_CHAT = "chat"
_ABOUT = "about.json"
_SHARD_TEXTS = 32
# Columns of one features call, and the shortest row in it.
_CALL_TOKENS, _SHORTEST_ROW = 1024, 64


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt that the target shall answer."""

    text_id: int
    prompt: np.ndarray


def claim(directory: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Keep texts of other settings apart: they would be mixed without a word.

    Args:
      directory: of the texts; made if it is not there.
      settings: all that the texts depend on.

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
    settings: drafter_run.Texts, encode: Callable[[types.Example], np.ndarray]
) -> list[Asked]:
    """Choose the prompts, training ones first, of every task in turns.

    Args:
      settings: which and how many.
      encode: example to token ids.

    Returns:
      `num + num_held_out` prompts.

    Raises:
      ValueError: a task is unknown or has no prompt that is short enough.
    """
    asked = []
    for split, count, first_id in (
        ("train", settings.num, 0),
        ("eval", settings.num_held_out, HELD_OUT),
    ):
        size = -(-count // len(settings.tasks))
        # A task that is named twice gives other prompts the second time.
        sets = [
            prompts.PromptSet(
                _task(
                    name, settings.seed + settings.tasks[:i].count(name), size
                ).examples(split),
                encode,
                max_tokens=settings.max_prompt_tokens,
                long_prompts="skip",
            ).prompts
            for i, name in enumerate(settings.tasks)
        ]
        for i in range(count):
            turn, which = divmod(i, len(sets))
            chosen = sets[which][turn % len(sets[which])]
            asked.append(Asked(first_id + i, chosen.tokens))
    return asked


def write(
    target: policy.Policy,
    asked: Sequence[Asked],
    buffer: shards.HiddenBuffer,
    *,
    settings: drafter_run.Texts,
    feature_layers: tuple[int, ...],
    seed: int,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Let the target answer the prompts that the buffer lacks, at temperature 1.

    Args:
      target: the model.
      asked: all prompts.
      buffer: gets the texts with their features.
      settings: lengths and batch.
      feature_layers: layers whose outputs are kept; empty: the last feature alone.
      seed: of the noise.
      on_progress: called with texts done, texts in all, and tokens drawn.
    """
    there = set(buffer.text_ids)
    missing = {one.text_id: one for one in asked if one.text_id not in there}
    if not missing:
        return
    engine = target.engine(
        max_rows=settings.max_batch,
        max_length=settings.max_prompt_tokens + settings.max_new_tokens,
        page_size=settings.page_size,
        steps_per_call=settings.steps_per_call,
    )
    forward = Features(target, feature_layers, settings.dtype)
    keys = dict(zip(missing, noise.request_keys(seed, missing), strict=True))
    done: list[types.Completion] = []

    def flush():
        texts = [np.concatenate([missing[c.request_id].prompt, c.tokens]) for c in done]
        computed = forward(texts)
        buffer.append(
            [
                shards.Record(
                    text_id=c.request_id,
                    tokens=text,
                    response_start=len(missing[c.request_id].prompt),
                    hidden=hidden,
                    features=features,
                    key=keys[c.request_id],
                )
                for c, text, (hidden, features) in zip(
                    done, texts, computed, strict=True
                )
            ]
        )
        done.clear()

    def collect(completion):
        done.append(completion)
        if len(done) == _SHARD_TEXTS:
            flush()

    def report(num_done, num_tokens):
        if on_progress:
            on_progress(len(there) + num_done, len(asked), num_tokens)

    requests = [
        types.Request(i, i, 0, one.prompt, settings.max_new_tokens)
        for i, one in missing.items()
    ]
    try:
        engine.run(requests, seed, on_completion=collect, on_call=report)
        if done:
            flush()
    finally:
        engine.pool.close()


class Features:
    """Computes a target's features over whole texts."""

    def __init__(self, target: policy.Policy, layers: tuple[int, ...], dtype: str):
        """Prepare; programs are compiled for each length of rows when needed.

        Args:
          target: the model.
          layers: whose outputs are wanted.
          dtype: of the results.
        """
        # Stacked layers compile once for all.
        self._params = jax.jit(_stack)(target.params)
        self._forward = jax.jit(
            functools.partial(
                _forward,
                cfg=target.config,
                layers=layers,
                dtype=jnp.dtype(target.precision),
                kept=jnp.dtype(dtype),
            )
        )

    def __call__(
        self, texts: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Compute `hidden [n, D]` and `features [n, n_layers * D]` of every text."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        results: list = [None] * len(texts)
        while order:
            width = max(_SHORTEST_ROW, _power_of_two(len(texts[order[-1]])))
            num_rows = max(1, _CALL_TOKENS // width)
            rows, order = order[-num_rows:], order[:-num_rows]
            tokens = np.zeros((num_rows, width), np.int32)
            for row, i in enumerate(rows):
                tokens[row, : len(texts[i])] = texts[i]
            hidden, features = jax.device_get(self._forward(self._params, tokens))
            for row, i in enumerate(rows):
                here = (row, slice(0, len(texts[i])))
                results[i] = (
                    hidden[here],
                    None if features is None else features[here],
                )
        return results


def _forward(params, tokens, *, cfg: model_config.ModelConfig, layers, dtype, kept):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    output = transformer.forward(
        params,
        cfg,
        tokens,
        positions,
        dtype=dtype,
        features=layers,
        with_cache_columns=False,
    )

    def columns_last(x):
        return jnp.moveaxis(x, 0, -1).astype(kept)

    if not layers:
        return columns_last(output.hidden), None
    return columns_last(output.hidden), columns_last(jnp.concatenate(output.features))


def _stack(params: model_params.Params) -> model_params.Params:
    if not isinstance(params.layers, tuple):
        return params
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers)
    return params.replace(layers=layers)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _task(name: str, seed: int, size: int) -> tasks.Task:
    if name == _CHAT:
        return chat.ChatPrompts(seed=seed, size=size, eval_size=size)
    return tasks.build(sections.Task(name=name, seed=seed, size=size), eval_size=size)
