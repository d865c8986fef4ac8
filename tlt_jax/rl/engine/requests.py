"""What may be asked of a rollout engine, and when what is asked is done."""

from collections.abc import Callable, Sequence

import numpy as np

from tlt_jax import types
from tlt_jax.rl.engine import scheduler


def check(requests: Sequence[types.Request], vocab_size: int, max_length: int) -> None:
    """Refuse requests that an engine for texts of `max_length` cannot answer.

    Raises:
      ValueError: a request is empty, does not fit, its id is not unique, or its prompt
        is not that of its `prompt_id` or not of the vocabulary.
    """
    if not requests:
        raise ValueError("requests is empty: give at least one.")
    ids = [request.request_id for request in requests]
    if len(set(ids)) < len(ids):
        raise ValueError("requests contain a request_id twice: ids key the noise.")
    prompts = {}
    for request in requests:
        prompt = prompts.setdefault(request.prompt_id, request.prompt)
        if not np.array_equal(prompt, request.prompt):
            raise ValueError(
                f"request {request.request_id} has another prompt than an earlier "
                f"one of prompt_id={request.prompt_id}: they share its pages, so "
                "give different prompts different ids."
            )
        if np.any((request.prompt < 0) | (request.prompt >= vocab_size)):
            raise ValueError(
                f"request {request.request_id} has a prompt token outside the "
                f"vocabulary of {vocab_size}: encode it with the model's "
                "own tokenizer."
            )
        if request.max_new_tokens < 1:
            raise ValueError(
                f"request {request.request_id} asks for max_new_tokens="
                f"{request.max_new_tokens}: at least 1."
            )
        if len(request.prompt) + request.max_new_tokens > max_length:
            raise ValueError(
                f"request {request.request_id} has a prompt of "
                f"{len(request.prompt)} tokens and asks for up to "
                f"{request.max_new_tokens} more, but the engine was made for "
                f"{max_length} in all: shorten it or raise "
                "task.max_prompt_tokens."
            )


def finish(
    row: scheduler.Row,
    num_new: int,
    ended: bool,
    *,
    stop: Sequence[str] = (),
    decode_text: Callable[[Sequence[int]], str] | None = None,
) -> types.FinishReason | None:
    """Say why a row is finished, if it is; cut it behind a stop string.

    Args:
      row: what it has drawn; tokens behind a stop string are removed.
      num_new: tokens drawn since the last call, which may hold a stop string's end.
      ended: the last token drawn ends the text.
      stop: strings that end a completion; the token that completes one is kept.
      decode_text: token ids to text; needed where there are stop strings.
    """
    length = _stop_length(row.tokens, num_new, stop, decode_text)
    if length is not None and not (ended and length == len(row.tokens)):
        del row.tokens[length:], row.logprobs[length:], row.was_drafted[length:]
        return "stop"
    if ended:
        return "eos"
    return None if row.remaining else "length"


def _stop_length(tokens, num_new, stop, decode_text) -> int | None:
    """Return after how many tokens a stop string first stands in the text."""
    if not stop or not any(s in decode_text(tokens) for s in stop):
        return None
    for length in range(len(tokens) - num_new + 1, len(tokens)):
        if any(s in decode_text(tokens[:length]) for s in stop):
            return length
    return len(tokens)
