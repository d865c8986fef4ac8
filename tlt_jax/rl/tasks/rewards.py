"""Scores of one completion: pure functions of a reference answer and a text.

A score is 1.0 for right and 0.0 for wrong. What is paid for must be the final answer:
each function first finds it and then compares it as a whole, so that naming several
candidates earns nothing. Several functions together are their weighted sum.
"""

import dataclasses
import difflib
import fractions
import functools
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from tlt_jax import types
from tlt_jax.runtime import external

RewardFunction = Callable[[types.Example, str], float]
# Stands among the names of reward functions for the task's own verifier.
OWN = "task"
# What the record says of rewards otherwise: no function's mean may have such a name.
_TAKEN = re.compile("mean|std|zero_std_frac|first_failure|scoring_.*|num_.*")

# "Answer: 7", "**Final answer:** 7", "ANSWER : 7".
_MARKER = re.compile(r"\banswer[*_ \t]*:[*_]*", re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# A minus belongs to the number unless it subtracts ("7-5"), a digit does unless it is
# part of a word ("H2O"). Thousands may be parted by commas. Exponents are short: exact
# arithmetic with 1e999999999 would never end.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\w)\]])[-+\u2212])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
    r"(?:\.\d+(?:[eE][-+]?\d{1,3})?|/\d+|[eE][-+]?\d{1,3})?"
    r"|(?<![\w.])(?:(?<![\w)\]])[-+\u2212])?\.\d+"
)


def extract_answer(
    text: str, *, numeric: bool = False, multiline: bool = False
) -> str | None:
    """Finds the final answer in a completion.

    It is what follows the last `Answer:` (letter case and emphasis do not matter); if
    there is none, what the last `<answer>` tag encloses; if there is none, the last
    number of a numeric answer, else the whole text. An `Answer:` that nothing follows
    is no answer, whatever came before it.

    Args:
      text: the completion.
      numeric: the answer is a number.
      multiline: the answer has several lines: all that follows `Answer:` is taken
        instead of the first line that is not blank.

    Returns:
      The answer without surrounding blanks, or None.
    """
    markers = list(_MARKER.finditer(text))
    if markers:
        answer = text[markers[-1].end() :].strip()
        if not multiline:
            answer = answer.partition("\n")[0].strip()
        return answer or None
    tags = _TAG.findall(text)
    if tags:
        return tags[-1].strip() or None
    return last_number(text) if numeric else text.strip() or None


def undecorated(answer: str) -> str:
    r"""Removes what surrounds an answer without changing it.

    That is emphasis, quotes, `$`, `\( \)`, `\boxed{}` and the sentence's full stop.
    """
    previous = None
    while previous != answer:
        previous = answer
        answer = answer.strip(" \t\n*`$\"'").removesuffix(".")
        answer = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", answer, flags=re.DOTALL)
        answer = re.sub(r"^\\boxed\{([^{}]*)\}$", r"\1", answer)
    return answer


def hedges(answer: str, gold: str) -> bool:
    """Tells whether an answer contains the right one among other words or numbers.

    Punctuation around it is none, and a single number (5.0 for 5) is no hedge either.
    """
    bare = undecorated(gold) or gold
    if answer == gold or bare not in answer or is_number(answer):
        return False
    return any(c.isalnum() for c in answer.replace(bare, "", 1))


def last_number(text: str) -> str | None:
    """Returns the last number in `text` in plain form (`-1234`, `3/4`), or None."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("\u2212", "-") if found else None


def is_number(text: str) -> bool:
    """Tells whether the whole of `text` is one number."""
    return bool(_NUMBER.fullmatch(text.strip()))


def exact_match(gold: str, text: str) -> float:
    """Scores 1.0 if the final answer is `gold`, letter for letter.

    Surrounding blanks and decoration (`undecorated`) do not count.
    """
    gold = gold.strip()
    answer = extract_answer(text, numeric=is_number(gold), multiline="\n" in gold)
    return float(answer is not None and gold in (answer, undecorated(answer)))


def number_match(gold: str, text: str) -> float:
    """Scores 1.0 if the final answer is a number equal to `gold`.

    Compared are exact rationals: 0.5, 1/2 and .50 are equal, 0.333 and 1/3 are not.

    Raises:
      ValueError: `gold` is not a number.
    """
    if not is_number(gold):
        raise ValueError(
            f"the reference answer {gold!r} is not a number: use the reward "
            "'math_verify' or 'exact'."
        )
    answer = extract_answer(text, numeric=True)
    if answer is None or not is_number(undecorated(answer)):
        return 0.0
    value = _value(undecorated(answer))
    return float(value is not None and value == _value(gold))


def _value(number: str) -> fractions.Fraction | None:
    try:
        return fractions.Fraction(last_number(number))
    except (ValueError, ZeroDivisionError):  # Thousands of digits, or x/0.
        return None


@functools.cache
def _math_verify() -> Any:
    """Imports math-verify (1.5 s: it brings sympy) when it is first asked for."""
    import math_verify

    # It warns once per process that its time limit is off; the pool's takes its place.
    for module in ("utils", "parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return math_verify


def math_verify_score(gold: str, text: str) -> float:
    r"""Scores 1.0 if the last mathematical answer in `text` equals `gold`.

    Knows LaTeX, `\boxed{}`, fractions and decimals, thousands and algebraic equality.
    Its own time limit is off, because that works in main threads only (`signal.alarm`);
    a hostile expression can take minutes, so that it belongs in a `RewardPool` with
    workers.

    Args:
      gold: an expression, with or without `$`.
      text: the completion.

    Raises:
      ValueError: `gold` cannot be read.
    """
    library = _math_verify()
    marked = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    wanted = library.parse(marked, parsing_timeout=None)
    if not wanted:
        raise ValueError(
            f"the reference answer {gold!r} is not mathematics that math-verify reads: "
            "use the reward 'exact'."
        )
    got = library.parse(text, parsing_timeout=None)
    return float(library.verify(wanted, got, timeout_seconds=None))


_BUILT_IN: dict[str, Callable[[str, str], float]] = {
    "exact": exact_match,
    "math_verify": math_verify_score,
    "number": number_match,
}


def needs_answer(name: str) -> bool:
    """Tells whether the reward `name` compares with a reference answer."""
    return name in _BUILT_IN


class NamedReward:
    """A reward function that is pickled as its name, and found again by it."""

    def __init__(self, name: str, function: RewardFunction):
        self._name, self._function = name, function

    def __call__(self, example: types.Example, text: str) -> float:
        return self._function(example, text)

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self._name,)


def named(name: str) -> NamedReward:
    """Returns a reward function by name.

    Args:
      name: `exact`, `math_verify`, `number`, or `package.module:function` of one's own
        that takes (example, text) and returns a number.

    Raises:
      ValueError: there is no such function, or it cannot take these arguments.
    """
    if ":" in name:
        return NamedReward(name, load_function(name))
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
    return NamedReward(name, functools.partial(_score_answer, _BUILT_IN[name]))


def _score_answer(
    compare: Callable[[str, str], float], example: types.Example, text: str
) -> float:
    if example.answer is None:
        raise ValueError(f"example {example.example_id!r} has no answer to compare.")
    return compare(example.answer, text)


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
    names: Sequence[str], weights: Sequence[float], own: RewardFunction
) -> RewardFunction | WeightedSum:
    """Returns what judges a run: one function as it is, several as weighted sum.

    Args:
      names: see `named`, and `task` for the task's own verifier; empty: `task`.
      weights: of each; empty: 1 each.
      own: the task's own verifier.

    Raises:
      ValueError: as `named`, or two functions are one.
    """
    names = tuple(names) or (OWN,)
    functions = [own if name == OWN else named(name) for name in names]
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
