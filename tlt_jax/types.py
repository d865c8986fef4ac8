"""Shape letters and the host records that every layer of the package shares.

Letters (inside array code a local carries its shape, `q_BTNH`; axes of fixed meaning):

| letter | meaning | letter | meaning |
| --- | --- | --- | --- |
| B | rows in a batch (B = P x R) | L | layers |
| P | prompts | N | query heads |
| R | responses per prompt (the group) | K | key/value heads |
| T | query positions in this call | G | query heads per kv head (N = K x G) |
| S | key/value positions | H | head dimension |
| W | nodes verified, root included | D | model dimension |
| A | longest accepted path + bonus | F | feed-forward dimension |
| E | children per node while drafting | V | vocabulary |
| M | queries of a kv head (M = G x T) | X | experts of a layer |
| C | experts that a token passes | | |

Features come first (`x_DBT`): activations are the columns that a weight `[out, in]`
multiplies. On CPUs this is the faster form of small products and elsewhere the compiler
chooses the layout anyway. Laws over the vocabulary have it last (`logprobs_BTV`).
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from jax import Array as Array

FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt of a task.

    Attributes:
      example_id: unique within its task; kept in every record about the prompt.
      prompt: plain text, or chat messages (`{"role": ..., "content": ...}`) that the
        tokenizer's chat template renders.
      answer: the reference answer that the reward compares with, if there is one.
      metadata: whatever the task's own verifier needs.
    """

    example_id: str
    prompt: str | tuple[dict[str, str], ...]
    answer: str | None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to generate.

    Attributes:
      request_id: the `r` of the position key (seed, r, t): it fixes the noise, so it is
        unique within a run and the same after a restart. Range [0, 2**63).
      prompt_id: requests with equal `prompt_id` have equal prompts and share its pages.
      sample: index within the group, 0 <= sample < R.
      prompt: `[num_prompt_tokens] int32`.
      max_new_tokens: completion length limit, EOS included.
    """

    request_id: int
    prompt_id: int
    sample: int
    prompt: np.ndarray
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came of a request.

    Attributes:
      request_id: the request's.
      tokens: `[n] int32`, the prompt excluded, EOS included where it was drawn.
      logprobs: `[n] float32`, natural log of the probability of each token under the
        sampling law (after temperature, top-k, top-p and min-p).
      finish_reason: `eos`, `stop` (a stop string appeared) or `length`.
      was_drafted: `[n] bool`: the token had been drafted, and the target accepted it.
        It says how the text was found and not what it is: another batch or drafter has
        others. None: nobody noted it.
      routes: `[m, L, C] uint8` or `uint16`: the experts that every position of prompt
        and completion passed, but the last one, which was drawn and never read. None:
        blocks are dense, or the engine was not asked.
    """

    request_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    was_drafted: np.ndarray | None = None
    routes: np.ndarray | None = None


def __getattr__(name: str) -> Any:
    """Give `Array` on demand: processes that only judge answers start without jax."""
    if name == "Array":
        import jax

        return jax.Array
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
