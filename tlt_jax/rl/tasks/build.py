"""Tasks: where prompts come from and how completions are judged.

`build` makes a task from its name: a built-in one for tiny models (`arithmetic`,
`count`), any generator of the reasoning-gym library (`products`, `chain_sum`, ...), or
a data set of one's own: a JSONL or Parquet file, a directory, `hub:NAME`.
"""

import dataclasses
import difflib
import hashlib
import inspect
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from tlt_jax import types
from tlt_jax.rl.tasks import counting, generated, random_numbers, rewards
from tlt_jax.rl.tasks import examples as examples_lib
from tlt_jax.rl.tasks import files as data_files
from tlt_jax.runtime import external
from tlt_jax.settings import sections

Style = Literal["plain", "cot", "two_shot"]

_OWN_VERIFIER = sections.Reward()
_COT = "Think step by step, then end with a line 'Answer: ' followed by the answer."


class Task(Protocol):
    """What a run asks of a task. Tasks can be pickled, so that processes can score.

    Attributes:
      name: for records.
      files: that it reads, whose content is compared when a run is taken up again; a
        task that reads none need not have this.
    """

    name: str

    def examples(self, split: generated.Split) -> Sequence[types.Example]:
        """Returns the examples of `train` or `eval`; generated ones when indexed."""

    def score(self, example: types.Example, text: str) -> float:
        """Judges one completion; 1.0 is right, 0.0 wrong."""


class ReasoningGymTask(generated.GeneratedTask):
    """A generator of the reasoning-gym library with its own verifier.

    Args:
      name: the generator.
      options: its own settings (difficulty, ...).
      seed: of the training and evaluation streams.
      size: training examples.
      eval_size: evaluation examples.
      style: `plain` gives the question; `cot` asks for steps, then a line `Answer: `;
        `two_shot` shows two solved questions of the same task before. The solved
        questions are in neither split.
      chat: prompts are messages; else text that ends with `Answer:` (with the request
        for steps in style `cot`), for models without a chat template.
      raw_score: give the verifier's own score in [0, 1]. It is not binary, and most
        verifiers pay for answers that merely contain the right one, some of them in
        full ("tac or dog" for cat spelt backward). By default such an answer scores
        0.0 (`rewards.hedges`), one of at least 0.99 else 1.0, and any other 0.0.
      holdout_frac: fraction of all questions kept for evaluation, in [0, 1); see
        `tiny_tasks`. An evaluation example costs 1 / holdout_frac draws: give 0 to
        generators that take seconds an item.

    Raises:
      ValueError: the library has no such generator, or an option is wrong.
    """

    def __init__(
        self,
        name: str,
        *,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        size: int = 1000,
        eval_size: int = 64,
        style: Style = "plain",
        chat: bool = True,
        raw_score: bool = False,
        holdout_frac: float = 0.2,
    ):
        if style not in typing.get_args(Style):
            raise ValueError(
                f"style={style!r} is not one of {', '.join(typing.get_args(Style))}."
            )
        _check_generator(name)
        super().__init__(name, size, eval_size, holdout_frac)
        self._options = dict(options or {})
        digest = hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest()
        self._seed = int.from_bytes(digest, "big") >> 35  # 29 bits
        self._sizes["shots"] = 32
        self._style, self._chat = style, chat
        self._raw_score = raw_score
        self._datasets: dict[tuple[str, int], Any] = {}
        self._verifier = self._dataset("train", 0)
        self._shots = self._find_shots() if style == "two_shot" else ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_datasets": {}, "_verifier": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._verifier = self._dataset("train", 0)

    def _dataset(self, stream: str, attempt: int) -> Any:
        """Returns the generator of a stream; streams never share a random seed.

        Item i of a generator is drawn with the seed `seed + i`, so a stream is an
        interval of seeds: `generated.MAX_SIZE` for each of 256 attempts.
        """
        key = (stream, attempt)
        if key not in self._datasets:
            offset = ["train", "eval", "shots"].index(stream) << 29
            self._datasets[key] = _create_dataset(
                self.name,
                self._options,
                size=self._sizes[stream],
                seed=self._seed + offset + attempt * generated.MAX_SIZE,
            )
        return self._datasets[key]

    def _find_shots(self) -> tuple[tuple[str, str], ...]:
        shots: dict[str, str] = {}
        for i in range(self._sizes["shots"]):
            entry = self._dataset("shots", 0)[i]
            if entry["answer"] is None:
                raise ValueError(
                    f"task {self.name!r} has no reference answers to show, it checks "
                    "by rule: use the style 'plain' or 'cot'."
                )
            shots.setdefault(entry["question"], entry["answer"])
            if len(shots) == 2:
                return tuple(shots.items())
        raise ValueError(
            f"task {self.name!r} has only one question with these options: make it "
            "harder, or use the style 'plain' or 'cot'."
        )

    def _example(self, split: generated.Split, index: int) -> types.Example:
        def make(attempt: int) -> tuple[str, dict[str, Any]]:
            entry = self._dataset(split, attempt)[index]
            return entry["question"], entry

        question, entry = self.draw(split, make)
        return types.Example(
            example_id=f"{self.name}/{split}/{index}",
            prompt=self._prompt(question),
            answer=entry["answer"],
            metadata={"question": question, "metadata": entry["metadata"]},
        )

    def belongs(self, question: str, split: generated.Split) -> bool:
        return question not in dict(self._shots) and super().belongs(question, split)

    def _prompt(self, question: str) -> str | tuple[dict[str, str], ...]:
        if self._chat:
            messages = []
            for shot, answer in self._shots:
                messages.append({"role": "user", "content": shot})
                messages.append({"role": "assistant", "content": f"Answer: {answer}"})
            if self._style == "cot":
                question = f"{question}\n\n{_COT}"
            return (*messages, {"role": "user", "content": question})
        if self._style == "cot":
            return f"{question}\n{_COT}\n"
        solved = "".join(f"{q}\nAnswer: {a}\n\n" for q, a in self._shots)
        return f"{solved}{question}\nAnswer:"

    def score(self, example: types.Example, text: str) -> float:
        """Judges the final answer (`rewards.extract_answer`) by the task's verifier.

        No answer scores 0.0.
        """
        gold = example.answer
        if not self._chat and self._style != "cot":
            text = f"Answer: {text}"  # The prompt ends with it.
        answer = rewards.extract_answer(
            text,
            numeric=gold is not None and rewards.is_number(gold),
            multiline=gold is None or "\n" in gold,
        )
        if answer is None:
            return 0.0
        entry = {**example.metadata, "answer": gold}
        candidates = dict.fromkeys((answer, rewards.undecorated(answer)))
        score = max(float(self._verifier.score_answer(c, entry)) for c in candidates)
        if self._raw_score:
            return score
        if gold is not None and all(rewards.hedges(c, gold) for c in candidates):
            return 0.0
        return float(score >= 0.99)


def _reasoning_gym() -> Any:
    # Here, because it takes a second that other tasks need not spend.
    from reasoning_gym import factory

    return factory


def _check_generator(name: str) -> None:
    generators = list(_reasoning_gym().DATASETS)
    if name not in generators:
        near = difflib.get_close_matches(name, [*_BUILT_IN, *generators], 1)
        raise ValueError(
            f"unknown task {name!r}"
            + (f": did you mean {near[0]!r}?" if near else ".")
            + f" There are {', '.join(_BUILT_IN)}, the generators of reasoning-gym "
            f"(products, chain_sum, ...), and data: {data_files.ACCEPTED}."
        )


def _check_options(
    name: str, options: Mapping[str, Any], accepted: Sequence[str]
) -> None:
    for key in options:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1)
            raise ValueError(
                f"task {name!r} has no option {key!r}"
                + (f"; did you mean {near[0]!r}? " if near else ". ")
                + f"It has {', '.join(accepted)}."
            )


def _create_dataset(name: str, options: Mapping[str, Any], **sizes: int) -> Any:
    factory = _reasoning_gym()
    reserved = set(options) & set(sizes)
    if reserved:
        raise ValueError(
            f"task {name!r}: {', '.join(sorted(reserved))} among its options: give the "
            "task's own size and seed."
        )
    known = getattr(factory.DATASETS[name][1], "__dataclass_fields__", {})
    _check_options(name, options, [key for key in known if key not in sizes])
    try:
        return factory.create_dataset(name, **options, **sizes)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"task {name!r} refuses its options {dict(options)}: {error}"
        ) from error


class FileTask:
    """Prompts and answers from a data set (`data.read_examples`).

    Attributes:
      files: that they were read from.

    Args:
      path: a file, a directory, or `hub:NAME`.
      reward: its own verifier, see `rewards.named`.
      chat: prompts that are text become messages of the user's, for the chat template.
      functions: names of all that judge, `task` is `reward`: those that compare with
        an answer need one.
      split, subset: of a set that has several, see `data_files.find`.
      eval_path: a data set of evaluation examples, read like this one; None: the
        fraction `holdout_frac` of all prompts is held out.
      eval_split: a split of evaluation examples, in the place of `eval_path`.
      eval_size: at most so many evaluation examples, the first ones.
      holdout_frac: see `tiny_tasks`; unused with `eval_path` or `eval_split`.
      limit: at most so many training examples, the first ones; None: all.
      prompt_key, answer_key, id_key, on_bad: see `data.read_examples`.

    Raises:
      ValueError: as `data.read_examples`; or the reward needs an answer that an
        example lacks, or there is no such reward.
    """

    def __init__(
        self,
        path: str,
        *,
        reward: str = "math_verify",
        chat: bool = False,
        functions: Sequence[str] = (rewards.OWN,),
        split: str | None = None,
        subset: str | None = None,
        eval_path: str | None = None,
        eval_split: str | None = None,
        eval_size: int = 64,
        holdout_frac: float = 0.1,
        limit: int | None = None,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        id_key: str = "id",
        on_bad: Literal["error", "skip"] = "error",
    ):
        generated.check_sizes(1 if limit is None else limit, eval_size, holdout_frac)
        self.name = path
        # What does not judge is not imported either: one of these takes seconds.
        judges = reward if rewards.OWN in functions else functions[0]
        self.score = rewards.named(judges)
        judges = [reward if name == rewards.OWN else name for name in functions]
        reading = {
            "prompt_key": prompt_key,
            "answer_key": answer_key,
            "id_key": id_key,
            "on_bad": on_bad,
            "subset": subset,
        }
        if eval_path is not None and eval_split is not None:
            raise ValueError(
                f"eval_path={eval_path!r} and eval_split={eval_split!r} both name "
                "evaluation examples: give one of them."
            )
        train = _read_answered(path, judges, reading | {"split": split})
        if eval_path is not None:
            own = {"split": None, "subset": None}
            held_out = _read_answered(eval_path, judges, reading | own)
        elif eval_split is not None:
            held_out = _read_answered(path, judges, reading | {"split": eval_split})
        else:
            parts: dict[bool, list[types.Example]] = {True: [], False: []}
            for example in train:
                is_held = generated.held_out(repr(example.prompt), holdout_frac)
                parts[is_held].append(example)
            train, held_out = parts[False], parts[True]
        self.files = _files_of(path, split, subset)
        if eval_path is not None:
            self.files += _files_of(eval_path, None, None)
        elif eval_split is not None:
            self.files += _files_of(path, eval_split, subset)
        train, held_out = train[:limit], held_out[:eval_size]
        if chat:
            train, held_out = (
                [examples_lib.as_chat(example) for example in examples]
                for examples in (train, held_out)
            )
        self._splits = {"train": train, "eval": held_out}

    def examples(self, split: generated.Split) -> Sequence[types.Example]:
        """Returns the split's examples.

        Raises:
          ValueError: it has none.
        """
        examples = self._splits[split]
        if not examples:
            raise ValueError(
                f"{self.name} leaves no examples for the split {split!r}: give more, "
                "another holdout_frac, or a file as eval_path."
            )
        return examples


def _files_of(
    path: str, split: str | None, subset: str | None
) -> tuple[pathlib.Path, ...]:
    return tuple(data_files.find(path, split, subset))


def _read_answered(
    path: str, judges: Sequence[str], reading: Mapping[str, Any]
) -> list[types.Example]:
    examples = examples_lib.read_examples(path, **reading)
    comparing = [name for name in judges if rewards.needs_answer(name)]
    for example in examples:
        if example.answer is None and comparing:
            raise ValueError(
                f"{path}: example {example.example_id!r} has no answer, which the "
                f"reward {comparing[0]!r} compares with: add it, name its column with "
                "answer_key, or use a reward function of yours."
            )
    return examples


class _Adapted:
    """A task with a system prompt, or with other rewards than its own."""

    def __init__(self, task: Task, system_prompt: str, reward: sections.Reward):
        self.name, self.files = task.name, files_of(task)
        self._task, self._system_prompt = task, system_prompt
        self.score = rewards.combined(reward.functions, reward.weights, task.score)

    def examples(self, split: generated.Split) -> Sequence[types.Example]:
        examples = self._task.examples(split)
        if not self._system_prompt:
            return examples
        return generated.LazyExamples(
            len(examples), lambda index: self._instruct(examples[index])
        )

    def _instruct(self, example: types.Example) -> types.Example:
        prompt, system = example.prompt, self._system_prompt
        if isinstance(prompt, str):
            return dataclasses.replace(example, prompt=f"{system}\n{prompt}")
        if prompt[0]["role"] == "system":
            raise ValueError(
                f"example {example.example_id!r} begins with a system message of its "
                "own: leave task.system_prompt empty."
            )
        message = {"role": "system", "content": system}
        return dataclasses.replace(example, prompt=(message, *prompt))


def files_of(task: Task) -> tuple[pathlib.Path, ...]:
    """Return the files that a task was read from: none, unless it says some."""
    return tuple(pathlib.Path(path) for path in getattr(task, "files", ()))


def build(
    task: sections.Task,
    *,
    reward: sections.Reward = _OWN_VERIFIER,
    eval_size: int = 64,
) -> Task:
    """Makes the task of a run.

    Args:
      task: `name` is `arithmetic`, `count`, `counting`, `random_numbers`, a
        reasoning-gym generator, a data set (`data_files.find`), or a class of one's own
        (`package.module:Name`, called with the options and the sizes below). `options`
        are the arguments of
        `ArithmeticTask`, `CountTask`, `CountingTask` or `FileTask`; for a generator
        they are those of `ReasoningGymTask` together with its own. `seed` and `size`
        are those of generated examples (files are used whole, see `FileTask`'s
        `limit`).
      reward: says what judges in place of the task's own verifier (`rewards.combined`).
      eval_size: number of evaluation examples (at most, for files).

    Raises:
      ValueError: the name is unknown (the nearest one is named), or an option is.
    """
    name, options = task.name, dict(task.options)
    sizes = {"seed": task.seed, "size": task.size, "eval_size": eval_size}
    if name in _BUILT_IN:
        made = _make(_BUILT_IN[name], name, options, sizes)
    elif data_files.is_data(name):
        functions = reward.functions or (rewards.OWN,)
        settings = {"eval_size": eval_size, "functions": functions}
        made = _make(FileTask, name, options, settings)
    elif external.is_external(name):
        options |= sizes | {"eval_size": eval_size}
        made = external.load("task", name)(**options)
    else:
        ours = ("style", "chat", "raw_score", "holdout_frac")
        sizes |= {key: options.pop(key) for key in ours if key in options}
        made = ReasoningGymTask(name, options=options, **sizes)
    if task.system_prompt or reward.functions:
        return _Adapted(made, task.system_prompt, reward)
    return made


def _make(
    kind: Callable[..., Task],
    name: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Task:
    """Calls a task's class, naming the option that it does not have."""
    parameters = inspect.signature(kind).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    accepted = [key for key in accepted if key not in settings]
    _check_options(name, options, accepted)
    path = (name,) if kind is FileTask else ()
    return kind(*path, **options, **settings)


_BUILT_IN: dict[str, Callable[..., Task]] = {
    "arithmetic": generated.ArithmeticTask,
    "count": generated.CountTask,
    "counting": counting.CountingTask,
    "random_numbers": random_numbers.RandomNumbersTask,
}
