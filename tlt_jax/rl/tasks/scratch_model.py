"""Small models made on the spot, for runs that need no weights from elsewhere.

A model learns the questions of a tiny task with answers of which a known part is
another question's. Its first rewards are therefore neither zero nor one: groups carry
signal from the first step, and what reinforcement learning adds can be seen.
"""

import dataclasses
import functools
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from tlt_jax.models import attention, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models import rows as rows_lib
from tlt_jax.models.formats import convert, hf_config
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.settings import schema, sections
from tlt_jax.types import Array

# A question's tokens and those of its answer, EOS included.
Text = tuple[np.ndarray, np.ndarray]

TASKS = ("arithmetic", "count")
_RECORD = "pretrain.json"
_FILES = frozenset(
    "config.json generation_config.json model.safetensors tokenizer.json "
    f"tokenizer_config.json {_RECORD}".split()
)
_REPORT_EVERY = 20
# Set before a process starts, XLA computes with so many threads.
_THREADS, _NUM_THREADS = "NPROC", 2
_CHILD = (
    "from tlt_jax.rl.tasks import scratch_model; from tlt_jax.runtime import "
    "compile_cache; compile_cache.enable(); scratch_model.serve()"
)
_PARAMS = "params"
_CLIP_NORM = 1.0


@struct.dataclass
class Batch:
    """Texts side by side in rows, seeing only themselves.

    Attributes:
      tokens: `[B, T] int32`, padding 0.
      positions: `[B, T] int32`, counted within the text, padding 0.
      segment: `[B, T] int32`, number of the text in its row, padding -1.
      answered: `[B, T] bool`, the token is an answer's.
    """

    tokens: Array
    positions: Array
    segment: Array
    answered: Array


@runtime_checkable
class Teachable(Protocol):
    """A task that says what there is to learn.

    Attributes:
      alphabet: the characters of its questions and answers.
    """

    alphabet: str

    def supervised_text(self, num: int) -> list[tuple[str, str]]:
        """Returns `num` questions of the training split with their right answers."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a model made on the spot depends on.

    It will be asked for completions of at most `max_new_tokens`.
    """

    seed: int
    pretrain: sections.Pretrain
    task: sections.Task
    max_new_tokens: int


def make(
    settings: Settings,
    task: tasks.Task,
    directory: str | os.PathLike,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Makes a model for a task and writes it as a Hugging Face directory.

    The directory appears complete or not at all. One that is complete is left as it is;
    one that lacks files is made again. The weights are a function of the settings,
    whose task has an alphabet and `supervised_text`, see `TASKS`. `on_progress` is
    called every few steps with the steps done, the steps in all, and the loss of the
    last one in nats per answer token.

    Raises:
      ValueError: the task teaches nothing, no model has these sizes, or the directory
        holds something else.
    """
    directory = os.path.abspath(directory)
    record = _record_of(settings)
    if os.path.isdir(directory) and _FILES <= set(os.listdir(directory)):
        _check_same(directory, record)
        return
    _remove_remains(directory)
    tokenizer, texts = read(task)
    cfg = model_of(settings, tokenizer, texts)
    params = _train_alike(cfg, texts, settings.pretrain, settings.seed, on_progress)
    parent, name = os.path.split(directory)
    os.makedirs(parent, exist_ok=True)
    # What a killed process leaves is removed by the name, see `workdir.files`.
    with tempfile.TemporaryDirectory(".partial", f".{name}.", parent) as temporary:
        made, files = os.path.join(temporary, "model"), os.path.join(temporary, "files")
        tokenizer.save(files)
        convert.save(params, cfg, made, tokenizer_source=files)
        with open(os.path.join(made, _RECORD), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
        os.rename(made, directory)


def read(task: tasks.Task) -> tuple[model_tokenizer.Tokenizer, list[Text]]:
    """Makes a task's tokenizer and encodes its training questions with their answers.

    Raises:
      ValueError: the task has no alphabet or no answers to learn from.
    """
    if not isinstance(task, Teachable):
        raise ValueError(
            f"task {task.name!r} cannot teach a model made from scratch: "
            f"task.name={' or '.join(map(repr, TASKS))} can, with task.system_prompt "
            "and reward.functions left empty; or give a model.spec with weights."
        )
    tokenizer = model_tokenizer.from_alphabet(task.alphabet)
    pairs = task.supervised_text(len(task.examples("train")))
    encode = tokenizer.encode
    texts = [(encode(q), np.append(encode(a), tokenizer.eos_ids)) for q, a in pairs]
    return tokenizer, texts


def model_of(
    settings: Settings,
    tokenizer: model_tokenizer.Tokenizer,
    texts: Sequence[Text],
) -> model_config.ModelConfig:
    """Describes the model: a llama with a tied head, or a Qwen3 mixture of experts.

    Raises:
      ValueError: no such model has these sizes.
    """
    sizes = settings.pretrain
    longest = settings.task.max_prompt_tokens + settings.max_new_tokens
    mixture = {"family": "llama"}
    if sizes.num_experts:
        experts = model_config.Experts(
            sizes.num_experts, sizes.experts_per_token, sizes.d_ff
        )
        mixture = {"family": "qwen3_moe", "qk_norm": True, "experts": experts}
    cfg = model_config.ModelConfig(
        **mixture,
        vocab_size=tokenizer.vocab_size,
        num_layers=sizes.num_layers,
        d_model=sizes.d_model,
        d_ff=sizes.d_ff,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        tie_embeddings=True,
        max_positions=max(longest, _width(texts)),
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    hf_config.to_hf(cfg)  # What could not be written is refused before the work.
    return cfg


def train(
    cfg: model_config.ModelConfig,
    texts: Sequence[Text],
    settings: sections.Pretrain,
    seed: int,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> model_params.Params:
    """Draws weights and teaches them the texts, questions and right answers.

    Texts are drawn at random and the fraction `noise_frac` of their answers exchanged,
    anew each time, so that of the noise nothing but its proportion can be learnt. For
    `on_progress` see `make`.

    Returns:
      float32 weights, layers stacked.
    """
    params = jax.jit(model_params.init, static_argnums=0)(cfg, jax.random.key(seed))
    if not settings.steps:
        return params
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(_CLIP_NORM), optax.adamw(schedule)
    )
    opt_state = jax.jit(optimizer.init)(params)
    step = jax.jit(
        functools.partial(_step, cfg=cfg, optimizer=optimizer), donate_argnums=(0, 1)
    )
    width = _width(texts)
    stream = noisy(texts, settings.noise_frac, np.random.default_rng(seed))
    rows = fill(stream, width)
    for done in range(1, settings.steps + 1):
        batch = lay_out(list(itertools.islice(rows, settings.num_rows)), width)
        params, opt_state, loss_value = step(params, opt_state, batch)
        if on_progress and (done % _REPORT_EVERY == 0 or done == settings.steps):
            on_progress(done, settings.steps, float(loss_value))
    return params


def _train_alike(cfg, texts, settings, seed, on_progress) -> model_params.Params:
    """Does what `train` does, with the same last bits on few and on many cores.

    On CPUs XLA parts a product among its threads, and sums of parts differ.
    """
    if jax.default_backend() != "cpu" or _num_threads() == _NUM_THREADS:
        return train(cfg, texts, settings, seed, on_progress)
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        env=os.environ | {_THREADS: str(_NUM_THREADS), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        pickle.dump((cfg, texts, settings, seed), child.stdin)
        child.stdin.close()
        try:
            while isinstance(told := pickle.load(child.stdout), tuple):
                if on_progress:
                    on_progress(*told)
        except EOFError as error:
            raise RuntimeError(
                f"the process that makes the model ended with status {child.wait()}."
            ) from error
    return told[_PARAMS]


def serve() -> None:
    """Trains what standard input describes; for `_train_alike`'s process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What libraries print is no answer.

    def tell(*progress):
        pickle.dump(progress, answers)
        answers.flush()

    params = train(*pickle.load(sys.stdin.buffer), tell)
    pickle.dump({_PARAMS: jax.device_get(params)}, answers)
    answers.close()


def _num_threads() -> int:
    """Threads that XLA computes with on CPUs, unless it has more devices."""
    if asked := os.environ.get(_THREADS):
        return int(asked)
    has = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1


def noisy(
    texts: Sequence[Text], noise_frac: float, rng: np.random.Generator
) -> Iterator[Text]:
    """Draws texts without end and gives some of them a random text's answer.

    An answer is exchanged with the probability `noise_frac`.
    """
    while True:
        chosen, other = rng.integers(len(texts), size=2)
        wrong = rng.random() < noise_frac
        yield texts[chosen][0], texts[other if wrong else chosen][1]


def fill(texts: Iterator[Text], width: int) -> Iterator[list[Text]]:
    """Gathers texts to rows of `width` tokens, in their order, as many as fit.

    No text is longer, and none is left out, or long ones would be rarer than drawn.
    """
    row = rows_lib.Rows(width, max_rows=1)
    for text in texts:
        size = sum(map(len, text))
        if row.place(text, size) is None:
            yield row.items[0]
            row = rows_lib.Rows(width, max_rows=1)
            row.place(text, size)


def lay_out(rows: Sequence[Sequence[Text]], width: int) -> Batch:
    """Lays out B rows of texts, each with at most `width` tokens."""
    columns = rows_lib.blank(len(rows), width)
    answered = np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        first = 0
        for number, (question, answer) in enumerate(row):
            tokens = np.concatenate([question, answer])
            here = rows_lib.write(columns, b, first, number, tokens)
            answered[b, first + len(question) : here.stop] = True
            first = here.stop
    return Batch(**columns, answered=answered)


def loss(
    params: model_params.Params, batch: Batch, *, cfg: model_config.ModelConfig
) -> Array:
    """Computes the mean cross entropy of answer tokens, given their text before them.

    A scalar, in nats per token.
    """
    inputs = jax.tree.map(lambda x: x[:, :-1], batch)
    hidden = transformer.forward(
        params,
        cfg,
        inputs.tokens,
        inputs.positions,
        attention.Visibility(segment=inputs.segment, prefix=inputs.segment),
        with_cache_columns=False,
    ).hidden
    entropy_BT = optax.softmax_cross_entropy_with_integer_labels(
        transformer.logits(params, hidden), batch.tokens[:, 1:]
    )
    return jnp.mean(entropy_BT, where=batch.answered[:, 1:])


def _step(params, opt_state, batch, *, cfg, optimizer):
    value, grads = jax.value_and_grad(loss)(params, batch, cfg=cfg)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def _width(texts: Sequence[Text]) -> int:
    """Length of the longest question with the longest answer, any of them."""
    return max(len(q) for q, _ in texts) + max(len(a) for _, a in texts)


def _record_of(settings: Settings) -> dict[str, Any]:
    """All settings on which the weights depend."""
    record = schema.to_dict(settings)
    # No weight depends on these: such a model has no chat template.
    del record["max_new_tokens"], record["task"]["template_options"]
    if not settings.pretrain.num_experts:
        # As they were recorded before there were experts.
        del record["pretrain"]["num_experts"], record["pretrain"]["experts_per_token"]
    return json.loads(json.dumps(record))  # Tuples become lists, as they are read.


def _check_same(directory: str, record: dict[str, Any]) -> None:
    """Raises ValueError if the model there was made with other settings."""
    made = hf_config.read_json(os.path.join(directory, _RECORD))
    for key, value in record.items():
        if made.get(key) != value:
            raise ValueError(
                f"{directory} holds a model made with {key}={made.get(key)}, but "
                f"{key}={value} is asked for: name another directory, or delete it."
            )


def _remove_remains(directory: str) -> None:
    """Removes a directory that lacks files, if nothing in it is of another origin."""
    if not os.path.lexists(directory):
        return
    others = [directory]
    if os.path.isdir(directory):
        others = sorted(set(os.listdir(directory)) - _FILES)
    if others:
        raise ValueError(
            f"{directory} should hold the model made from scratch, but there is "
            f"{others[0]}: name another directory, or move it away."
        )
    shutil.rmtree(directory)
