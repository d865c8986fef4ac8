"""Lists of random numbers, for chat models: answers that nobody can foresee.

The opposite of `counting`: the law of every token is broad and simple, so a drafter can
know it exactly and still not guess the token, unless it knows the noise as well. Many
different answers are right; what is learned is not to repeat oneself.
"""

import random
import re

from tlt_jax import types
from tlt_jax.rl.tasks import generated


class RandomNumbersTask(generated.GeneratedTask):
    """`Write 12 different random numbers from 1 to 80, separated by commas.`

    Without examples before it, small models answer at temperature 1 with anything.

    Args:
      min_num, max_num: fewest and most numbers asked for, drawn evenly.
      max_top: numbers are asked for from 1 to a bound, which is drawn evenly from twice
        `max_num` to this.
      num_shots: answered examples before the question, at least 0.
      seed, size, eval_size, holdout_frac: as in `tasks.ReasoningGymTask`.
    """

    def __init__(
        self,
        *,
        min_num: int = 10,
        max_num: int = 30,
        max_top: int = 100,
        num_shots: int = 2,
        seed: int = 0,
        size: int = 1000,
        eval_size: int = 64,
        holdout_frac: float = 0.2,
    ):
        if not 1 <= min_num <= max_num or max_top < 2 * max_num or num_shots < 0:
            raise ValueError(
                f"min_num={min_num}, max_num={max_num}, max_top={max_top}, num_shots="
                f"{num_shots}: 1 <= min_num <= max_num, max_top of at least twice "
                "max_num and num_shots of at least 0 are accepted."
            )
        super().__init__("random_numbers", size, eval_size, holdout_frac)
        self._min_num, self._max_num, self._max_top = min_num, max_num, max_top
        self._num_shots, self._seed = num_shots, seed

    def _example(self, split: generated.Split, index: int) -> types.Example:
        rng = random.Random(f"{self._seed}/{split}/{index}")
        messages = []
        for _ in range(self._num_shots):
            question, (num, top) = self._question(rng)
            numbers = rng.sample(range(1, top + 1), num)
            answer = ", ".join(map(str, numbers))
            messages += [("user", question), ("assistant", answer)]
        question, (num, top) = self.draw(split, lambda _: self._question(rng))
        messages.append(("user", question))
        turns = tuple({"role": role, "content": text} for role, text in messages)
        return types.Example(f"{self.name}/{split}/{index}", turns, f"{num} of {top}")

    def _question(self, rng: random.Random) -> tuple[str, tuple[int, int]]:
        num = rng.randint(self._min_num, self._max_num)
        top = rng.randint(2 * self._max_num, self._max_top)
        text = f"Write {num} different random numbers from 1 to {top}, separated by"
        return f"{text} commas.", (num, top)

    def score(self, example: types.Example, text: str) -> float:
        """Scores different numbers in range by the larger of asked for and given."""
        num, top = map(int, example.answer.split(" of "))
        given = [int(digits) for digits in re.findall(r"\d{1,9}", text)]
        right = {number for number in given if 1 <= number <= top}
        return min(len(right), num) / max(len(given), num)
