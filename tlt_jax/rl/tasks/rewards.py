"""Scores of one completion: pure functions of a reference answer and a text.

A score is 1.0 for right and 0.0 for wrong. What is paid for must be the final answer:
each function first finds it and then compares it as a whole, so that naming several
candidates earns nothing. Several functions together are their weighted sum.
"""

import dataclasses
import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from tlt_jax import types
from tlt_jax.rl.tasks import answers
from tlt_jax.runtime import external

RewardFunction = Callable[[types.Example, str], float]
# Stands among the names of reward functions for the task's own verifier.
OWN = "task"
# What the record says of rewards otherwise: no function's mean may have such a name.
_TAKEN = re.compile("mean|std|zero_std_frac|first_failure|scoring_.*|num_.*")


def exact_match(gold: str, text: str, *, unfinished_thoughts: bool = False) -> float:
    """Scores 1.0 if the final answer is `gold`, letter for letter.

    Surrounding blanks and decoration (`answers.undecorated`) do not count.
    """
    gold = gold.strip()
    answer = answers.extract_answer(
        text,
        kind="number" if answers.is_number(gold) else "text",
        multiline="\n" in gold,
        unfinished_thoughts=unfinished_thoughts,
    )
    if answer is None:
        return 0.0
    accepted = {gold, answers.undecorated(gold) or gold}
    return float(not accepted.isdisjoint((answer, answers.undecorated(answer))))


def number_match(gold: str, text: str, *, unfinished_thoughts: bool = False) -> float:
    """Scores 1.0 if the final answer is a number equal to `gold`.

    Compared are exact rationals: 0.5, 1/2 and .50 are equal, 0.333 and 1/3 are not. A
    percentage equals the number without the sign and its hundredth.

    Raises:
      ValueError: `gold` is not a number.
    """
    wanted = answers.values(gold)
    if not wanted:
        raise ValueError(
            f"the reference answer {gold!r} is not a number: use the reward "
            "'math_verify' or 'exact'."
        )
    answer = answers.extract_answer(
        text, kind="number", unfinished_thoughts=unfinished_thoughts
    )
    got = answers.values(answer or "")
    return float(not set(wanted).isdisjoint(got))


@functools.cache
def _math_verify() -> Any:
    """Imports math-verify (1.5 s: it brings sympy) when it is first asked for."""
    import math_verify

    # It warns once per process that its time limit is off; the pool's takes its place.
    for module in ("utils", "parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return math_verify


def math_verify_score(
    gold: str, text: str, *, unfinished_thoughts: bool = False
) -> float:
    r"""Scores 1.0 if the final answer in `text` equals `gold`, mathematically.

    Knows LaTeX, fractions and decimals, thousands and algebraic equality; the answer is
    read as a whole, so that several candidates are a set. Its own time limit is off,
    because that works in main threads only (`signal.alarm`); a hostile expression can
    take minutes, so that it belongs in a `RewardPool` with workers.

    Args:
      gold: an expression, with or without `$`.
      text: the completion.
      unfinished_thoughts: see `answers.extract_answer`.

    Raises:
      ValueError: `gold` cannot be read.
    """
    library = _math_verify()
    marked = answers.with_ascii_minus(gold)
    marked = marked if "$" in gold or "\\boxed" in gold else f"${marked}$"
    wanted = library.parse(marked, parsing_timeout=None)
    if not wanted:
        raise ValueError(
            f"the reference answer {gold!r} is not mathematics that math-verify reads: "
            "use the reward 'exact'."
        )
    answer = answers.extract_answer(
        text, kind="formula", unfinished_thoughts=unfinished_thoughts
    )
    if answer is None:
        return 0.0
    if not set(answers.values(gold)).isdisjoint(answers.values(answer)):
        return 1.0
    whole = answers.with_ascii_minus(answers.alone(answer))
    if not answers.is_balanced(whole):
        return 0.0
    got = library.parse(f"\\boxed{{{whole}}}", parsing_timeout=None)
    return float(library.verify(wanted, got, timeout_seconds=None))


_BUILT_IN: dict[str, Callable[..., float]] = {
    "exact": exact_match,
    "math_verify": math_verify_score,
    "number": number_match,
}


def needs_answer(name: str) -> bool:
    """Tells whether the reward `name` compares with a reference answer."""
    return name in _BUILT_IN


class NamedReward:
    """A reward function that is pickled as the arguments of `named`."""

    def __init__(self, function: RewardFunction, *arguments: Any):
        self._function, self._arguments = function, arguments

    def __call__(self, example: types.Example, text: str) -> float:
        return self._function(example, text)

    def __reduce__(self) -> tuple[Any, ...]:
        return named, self._arguments


def named(name: str, unfinished_thoughts: bool = False) -> NamedReward:
    """Returns a reward function by name.

    Args:
      name: `exact`, `math_verify`, `number`, or `package.module:function` of one's own
        that takes (example, text) and returns a number.
      unfinished_thoughts: see `answers.extract_answer`; a function of one's own does as
        it likes.

    Raises:
      ValueError: there is no such function, or it cannot take these arguments.
    """
    if ":" in name:
        return NamedReward(load_function(name), name)
    if name not in _BUILT_IN:
        near = difflib.get_close_matches(name, (OWN, *_BUILT_IN), 1)
        raise ValueError(
            f"unknown reward {name!r}: "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"There are {', '.join((OWN, *_BUILT_IN))}, or package.module:function "
            "of yours."
        )
    if name == "math_verify":
        _math_verify()  # Now, so that no scoring waits for the import.
    compare = functools.partial(
        _BUILT_IN[name], unfinished_thoughts=unfinished_thoughts
    )
    function = functools.partial(_score_answer, compare)
    return NamedReward(function, name, unfinished_thoughts)


def _score_answer(
    compare: Callable[[str, str], float], example: types.Example, text: str
) -> float:
    if example.answer is None:
        raise ValueError(f"example {example.example_id!r} has no answer to compare.")
    return compare(example.answer, answers.turn(example, text))


def load_function(path: str) -> RewardFunction:
    """Imports a user's reward function.

    Args:
      path: `package.module:function`; the function is called as
        `function(example, text)` and returns a finite number.

    Raises:
      ValueError: the form is another one, module or function is missing, importing
        fails, it is not callable, or cannot be called with two arguments.
    """
    function = external.load("reward function", path)
    try:
        signature = inspect.signature(function)
    except ValueError:  # Some built-in functions have none to check.
        return function
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise ValueError(
            f"reward function {path!r} has the signature {signature}: it is called "
            f"with two arguments, (example, text) ({error})."
        ) from error
    return function


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the functions of a `WeightedSum` say of one completion.

    Attributes:
      names: of the functions, as the record has them.
      values: of each, as they came.
      weights: of each.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]
    weights: tuple[float, ...]


class WeightedSum:
    """Several reward functions, called one after the other; see `combined`.

    Attributes:
      names: of the functions, as the record has them.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        functions: Sequence[RewardFunction],
    ):
        self.names, self._weights = tuple(names), tuple(weights)
        self._functions = tuple(functions)

    def __call__(self, example: types.Example, text: str) -> Verdict:
        values = tuple(function(example, text) for function in self._functions)
        return Verdict(self.names, values, self._weights)


def combined(
    names: Sequence[str],
    weights: Sequence[float],
    own: RewardFunction,
    unfinished_thoughts: bool = False,
) -> RewardFunction | WeightedSum:
    """Returns what judges a run: one function as it is, several as weighted sum.

    Args:
      names: see `named`, and `task` for the task's own verifier; empty: `task`.
      weights: of each; empty: 1 each.
      own: the task's own verifier.
      unfinished_thoughts: of the others, see `named`.

    Raises:
      ValueError: as `named`, or two functions are one.
    """
    names = tuple(names) or (OWN,)
    functions = [
        own if name == OWN else named(name, unfinished_thoughts) for name in names
    ]
    weights = tuple(weights) or (1.0,) * len(names)
    if weights == (1.0,):
        return functions[0]
    return WeightedSum(record_names(names), weights, functions)


def record_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the name that each function has in the record.

    It is the function's own, in lower case, with its module's before it where another
    one is called so, too, or where the record has another meaning for it.

    Raises:
      ValueError: two functions are one, or have names that are equal in lower case.
    """

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9_.]", "_", name.lower()).lstrip("_.") or "function"

    short = [plain(name.rpartition(":")[2]) for name in names]
    found = [
        plain(name.replace(":", "."))
        if short.count(one) > 1 or _TAKEN.fullmatch(one)
        else one
        for name, one in zip(names, short, strict=True)
    ]
    for i, one in enumerate(found):
        if one in found[:i]:
            raise ValueError(
                f"reward.functions={','.join(names)} names {one!r} twice: name each "
                "function once, and say by reward.weights what it counts."
            )
    return tuple(found)
