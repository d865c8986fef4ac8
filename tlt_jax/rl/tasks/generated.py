"""Tasks that draw their examples, and two built-in ones for tiny models.

A drawn task's splits are disjoint in two ways: they come from disjoint random streams,
and the fraction `holdout_frac` of all *questions*, chosen by a hash of their text and
by nothing else, is kept for evaluation, whatever seed a run has. The second matters
because small tasks repeat themselves: products of two digits are 100 questions.
"""

import hashlib
import operator
import random
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from tlt_jax import types

Split = Literal["train", "eval"]
Drawn = TypeVar("Drawn")

# Draws per example before a split counts as empty.
MAX_DRAWS = 250
# The largest size of a split.
MAX_SIZE = 1 << 21

_OPERATORS = ({"+"}, {"-"}, {"+", "-"})


class LazyExamples(Sequence[types.Example]):
    """A sequence whose items are made when asked for."""

    def __init__(self, size: int, make: Callable[[int], types.Example]):
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        return self._make(range(self._size)[operator.index(index)])


def held_out(question: str, holdout_frac: float) -> bool:
    """Tells whether a question is among the fraction kept for evaluation."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < holdout_frac * 2**64


def check_sizes(size: int, eval_size: int, holdout_frac: float) -> None:
    """Raises ValueError if a split's size or the held-out fraction is out of range."""
    for name, value in (("size", size), ("eval_size", eval_size)):
        if not 1 <= value <= MAX_SIZE:
            raise ValueError(
                f"{name}={value} is out of range: from 1 to {MAX_SIZE} examples."
            )
    if not 0.0 <= holdout_frac < 1.0:
        raise ValueError(
            f"holdout_frac={holdout_frac} is out of range: at least 0 (splits differ "
            "in their random streams only) and below 1."
        )


class GeneratedTask:
    """What generated tasks share: two splits of given sizes, made when indexed."""

    def __init__(self, name: str, size: int, eval_size: int, holdout_frac: float = 0.0):
        check_sizes(size, eval_size, holdout_frac)
        self.name = name
        self._sizes = {"train": size, "eval": eval_size}
        self._holdout_frac = holdout_frac

    def examples(self, split: Split) -> Sequence[types.Example]:
        """Returns the split's examples, generated when indexed."""
        return LazyExamples(
            self._sizes[split], lambda index: self._example(split, index)
        )

    def _example(self, split: Split, index: int) -> types.Example:
        raise NotImplementedError

    def belongs(self, question: str, split: Split) -> bool:
        """Tells whether a question may stand in the split."""
        frac = self._holdout_frac
        return not frac or held_out(question, frac) == (split == "eval")

    def draw(
        self, split: Split, make: Callable[[int], tuple[str, Drawn]]
    ) -> tuple[str, Drawn]:
        """Returns the first (question, what belongs to it) that may stand in a split.

        `make` draws one, given how many were drawn before.

        Raises:
          ValueError: none of `MAX_DRAWS` may.
        """
        for attempt in range(MAX_DRAWS):
            drawn = make(attempt)
            if self.belongs(drawn[0], split):
                return drawn
        raise ValueError(
            f"task {self.name!r}: {MAX_DRAWS} draws gave no question for this split; "
            "the task has too few different questions. Make it harder, or change "
            "holdout_frac (0: the splits may share questions)."
        )


def leading_frac(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Returns the right leading items as a part of the longer of both."""
    right = 0
    while right < min(len(wanted), len(got)) and wanted[right] == got[right]:
        right += 1
    return right / max(len(wanted), len(got))


def pareto(rng: random.Random, least: int, most: int, alpha: float) -> int:
    """Draws n with P(n >= k) = (least / k)^alpha for k up to `most`."""
    uniform = 1.0 - rng.random()
    # Compared first, because with a small alpha the power may overflow.
    if uniform <= (least / most) ** alpha:
        return most
    return int(least * uniform ** (-1.0 / alpha))


class _TextTask(GeneratedTask):
    """A task whose prompts and answers are short texts."""

    def supervised_text(self, num: int) -> list[tuple[str, str]]:
        """Returns `num` (prompt, right answer) pairs of the training split."""
        examples = self.examples("train")[:num]
        return [(example.prompt, example.answer) for example in examples]


class ArithmeticTask(_TextTask):
    """Sums of small numbers as short text, `3+4=` -> `7`, for tiny models.

    Args:
      max_operand: operands are drawn evenly from 0 to it.
      num_terms: operands per sum, at least 2.
      operators: drawn evenly from these, `+`, `-` or both.
      seed, size, eval_size, holdout_frac: as in `ReasoningGymTask`.
    """

    def __init__(
        self,
        *,
        max_operand: int = 9,
        num_terms: int = 2,
        operators: str = "+",
        seed: int = 0,
        size: int = 1000,
        eval_size: int = 64,
        holdout_frac: float = 0.2,
    ):
        if max_operand < 1 or num_terms < 2 or set(operators) not in _OPERATORS:
            raise ValueError(
                f"max_operand={max_operand}, num_terms={num_terms}, operators="
                f"{operators!r}: at least 1, at least 2, and '+', '-' or '+-' are "
                "accepted."
            )
        super().__init__("arithmetic", size, eval_size, holdout_frac)
        self.alphabet = "0123456789=" + "".join(sorted({*operators}))
        self._max_operand, self._num_terms = max_operand, num_terms
        self._operators = operators
        self._seed = seed

    def _example(self, split: Split, index: int) -> types.Example:
        rng = random.Random(f"{self._seed}/{split}/{index}")
        question, answer = self.draw(split, lambda _: self._sum(rng))
        return types.Example(f"{self.name}/{split}/{index}", question, answer)

    def _sum(self, rng: random.Random) -> tuple[str, str]:
        total = rng.randint(0, self._max_operand)
        text = str(total)
        for _ in range(self._num_terms - 1):
            sign = rng.choice(self._operators)
            term = rng.randint(0, self._max_operand)
            text += f"{sign}{term}"
            total += term if sign == "+" else -term
        return f"{text}=", str(total)

    def score(self, example: types.Example, text: str) -> float:
        """Scores 1.0 if the text is the answer, blanks around it aside."""
        return float(text.strip() == example.answer)


class CountTask(_TextTask):
    """Counting, `n=4:` -> `1 2 3 4`: answers of long-tailed length for tiny models.

    n follows a Pareto law, P(n >= k) = (min_n / k)^alpha for k up to max_n. There are
    few questions, so that the splits share them.

    Args:
      min_n: smallest n, at least 1.
      max_n: largest n; it gathers the tail beyond it.
      alpha: the tail's exponent, above 0; the smaller, the heavier.
      partial_credit: score the fraction of right leading numbers instead of all or
        nothing.
      seed, size, eval_size: as in `ReasoningGymTask`.
    """

    alphabet = "0123456789 n=:"

    def __init__(
        self,
        *,
        min_n: int = 2,
        max_n: int = 64,
        alpha: float = 1.0,
        partial_credit: bool = False,
        seed: int = 0,
        size: int = 1000,
        eval_size: int = 64,
    ):
        if not 1 <= min_n <= max_n or not alpha > 0:
            raise ValueError(
                f"min_n={min_n}, max_n={max_n}, alpha={alpha}: 1 <= min_n <= max_n and "
                "alpha above 0 are accepted."
            )
        super().__init__("count", size, eval_size)
        self._min_n, self._max_n, self._alpha = min_n, max_n, alpha
        self._partial_credit = partial_credit
        self._seed = seed

    def _example(self, split: Split, index: int) -> types.Example:
        rng = random.Random(f"{self._seed}/{split}/{index}")
        n = pareto(rng, self._min_n, self._max_n, self._alpha)
        answer = " ".join(map(str, range(1, n + 1)))
        return types.Example(f"{self.name}/{split}/{index}", f"n={n}:", answer)

    def score(self, example: types.Example, text: str) -> float:
        """Scores 1.0 for the exact answer.

        With partial credit: right leading numbers divided by the longer of text and
        answer in numbers, so that neither stopping early nor going on is free.
        """
        if not self._partial_credit:
            return float(text.strip() == example.answer)
        return leading_frac(example.answer.split(), text.split())
