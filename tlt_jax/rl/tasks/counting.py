"""Counting in words, for chat models: answers of long-tailed length that are checked.

It is the smallest task with what makes rollouts of reasoning models slow: most answers
are short, a few are many times as long, and a model can be right or wrong at each step.
"""

import random
import re

from tlt_jax import types
from tlt_jax.rl.tasks import generated

# What stands before the question, as answered turns.
_SHOTS = ((3, 9), (21, 33), (64, 70))


class CountingTask(generated.GeneratedTask):
    """`Count from 7 to 21, separated by commas.` -> `7, 8, ..., 21`.

    Without examples before it, small models answer at temperature 1 with anything.

    The number of numbers follows a Pareto law, P(num >= k) = (min_num / k)^alpha for k
    up to max_num.

    Args:
      min_num: fewest numbers, at least 1.
      max_num: most numbers; it gathers the tail beyond it.
      alpha: the tail's exponent, above 0; the smaller, the heavier.
      max_start: the first number is drawn evenly from 1 to it.
      num_shots: answered examples before the question, at most 3.
      pass_mark: in [0, 1]; above 0 an answer passes, with 1, if it has so many of the
        numbers right, and else scores 0.
      seed, size, eval_size, holdout_frac: as in `tasks.ReasoningGymTask`.
    """

    def __init__(
        self,
        *,
        min_num: int = 5,
        max_num: int = 50,
        alpha: float = 1.0,
        max_start: int = 40,
        num_shots: int = 2,
        pass_mark: float = 0.0,
        seed: int = 0,
        size: int = 1000,
        eval_size: int = 64,
        holdout_frac: float = 0.2,
    ):
        if not 1 <= min_num <= max_num or not alpha > 0 or max_start < 1:
            raise ValueError(
                f"min_num={min_num}, max_num={max_num}, alpha={alpha}, max_start="
                f"{max_start}: 1 <= min_num <= max_num, alpha above 0 and max_start of "
                "at least 1 are accepted."
            )
        if not 0 <= pass_mark <= 1:
            raise ValueError(f"pass_mark={pass_mark} is not in [0, 1].")
        if not 0 <= num_shots <= len(_SHOTS):
            raise ValueError(
                f"num_shots={num_shots}: there are 0 to {len(_SHOTS)} examples."
            )
        super().__init__("counting", size, eval_size, holdout_frac)
        self._min_num, self._max_num = min_num, max_num
        self._alpha, self._max_start = alpha, max_start
        self._shots = [
            {"role": role, "content": text}
            for shot in _SHOTS[:num_shots]
            for role, text in zip(("user", "assistant"), _count(*shot), strict=True)
        ]
        self._pass_mark, self._seed = pass_mark, seed

    def _example(self, split: generated.Split, index: int) -> types.Example:
        rng = random.Random(f"{self._seed}/{split}/{index}")
        question, answer = self.draw(split, lambda _: self._question(rng))
        messages = (*self._shots, {"role": "user", "content": question})
        return types.Example(f"{self.name}/{split}/{index}", messages, answer)

    def _question(self, rng: random.Random) -> tuple[str, str]:
        num = generated.pareto(rng, self._min_num, self._max_num, self._alpha)
        start = rng.randint(1, self._max_start)
        return _count(start, start + num - 1)

    def score(self, example: types.Example, text: str) -> float:
        """Scores right leading numbers by the longer of answer and text, in numbers.

        So neither stopping early nor going on is free; words between numbers are.
        """
        wanted = example.answer.split(", ")
        score = generated.leading_frac(wanted, re.findall(r"\d+", text))
        return float(score >= self._pass_mark) if self._pass_mark else score


def _count(start: int, stop: int) -> tuple[str, str]:
    """Question and answer."""
    answer = ", ".join(map(str, range(start, stop + 1)))
    return f"Count from {start} to {stop}, separated by commas.", answer
