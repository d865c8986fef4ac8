"""A task's prompts as token ids, drawn in an order that is a function of a position."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from tlt_jax import types
from tlt_jax.rl.tasks import answers

# An opening tag of thoughts and blanks behind it have no more tokens.
_TAIL_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the engine.

    Attributes:
      prompt_id: index of its example; the same in every epoch.
      example: what the reward judges by.
      tokens: `[n] int32`, template included.
    """

    prompt_id: int
    example: types.Example
    tokens: np.ndarray


class PromptSet:
    """All prompts of a split."""

    def __init__(
        self,
        examples: Sequence[types.Example],
        encode: Callable[[types.Example], np.ndarray],
        *,
        max_tokens: int,
        long_prompts: str,
        decode: Callable[[np.ndarray], str] | None = None,
    ):
        """Encode every example.

        Args:
          examples: at least one.
          encode: example to token ids, template included.
          max_tokens: longest prompt accepted.
          long_prompts: what becomes of a longer one: `refuse` or `skip`.
          decode: token ids to text, special tokens as well; with it the metadata of an
            example say whether its prompt begins the answer's thoughts.

        Raises:
          ValueError: a prompt is empty, or too long and to be refused, or none is left.
        """
        self.num_skipped = 0
        self.prompts: list[Prompt] = []
        for index, example in enumerate(examples):
            tokens = encode(example)
            if len(tokens) == 0:
                raise ValueError(
                    f"example {example.example_id} has an empty prompt: give it text, "
                    "or leave it out of the data."
                )
            if decode and answers.opens_thought(decode(tokens[-_TAIL_TOKENS:])):
                metadata = example.metadata | {answers.IN_THOUGHT: True}
                example = dataclasses.replace(example, metadata=metadata)
            if len(tokens) <= max_tokens:
                self.prompts.append(Prompt(index, example, tokens))
            elif long_prompts == "skip":
                self.num_skipped += 1
            else:
                raise ValueError(
                    f"example {example.example_id} has a prompt of {len(tokens)} "
                    f"tokens, more than task.max_prompt_tokens={max_tokens}: raise the "
                    "limit, shorten the prompt, or set task.long_prompts='skip'."
                )
        if not self.prompts:
            raise ValueError(
                f"no prompt is left of {len(examples)} ({self.num_skipped} are longer "
                f"than task.max_prompt_tokens={max_tokens}): raise the limit."
            )

    def draw(self, position: int, count: int, seed: int) -> list[Prompt]:
        """Return the `count` prompts from `position` on in the endless shuffled line.

        The line is one permutation of all prompts per epoch, so that a position is all
        that a resumed run must know.
        """
        num = len(self.prompts)
        places = [divmod(position + i, num) for i in range(count)]
        return [self.prompts[epoch_order(num, seed, e)[i]] for e, i in places]


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Draws the order in which one epoch visits the examples.

    A pure function of its arguments, the same on every platform and NumPy release: the
    examples are sorted by the raw output of a counter-based generator. There is one
    example at least; seed and epoch are not negative.

    Returns:
      `[num_examples] int64`, a permutation; read-only.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    order = np.argsort(generator.random_raw(num_examples), kind="stable")
    order.setflags(write=False)
    return order


def requests_of(
    prompts: Sequence[Prompt], group_size: int, max_new_tokens: int, first_id: int
) -> list[types.Request]:
    """Ask for `group_size` completions of every prompt, ids counted from `first_id`.

    A prompt drawn twice (at the end of an epoch) makes two groups that share pages.
    """
    return [
        types.Request(
            request_id=first_id + group * group_size + sample,
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.tokens,
            max_new_tokens=max_new_tokens,
        )
        for group, prompt in enumerate(prompts)
        for sample in range(group_size)
    ]
