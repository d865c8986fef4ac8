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


# What a decoder gives for bytes that are no character, or not yet.
_UNKNOWN = "\ufffd"
# Letters before those that count, in which a decoder may see that a text was cut: it
# drops a leading space, joins words, and half a character is unknown.
_MARGIN = 16


def _stop_length(tokens, num_new, stop, decode_text) -> int | None:
    """Return after how many tokens a stop string first stands in the text."""
    if not stop:
        return None
    old = len(tokens) - num_new
    start, since = _tail(tokens, old, max(map(len, stop)), stop, decode_text)

    def stands(length):
        text = decode_text(tokens[start:length])
        return any(text.find(one, since) >= 0 for one in stop)

    if not stands(len(tokens)):
        return None
    for length in range(old + 1, len(tokens)):
        if stands(length):
            return length
    return len(tokens)


def _tail(tokens, old, longest, stop, decode_text) -> tuple[int, int]:
    """Return the token, and in the text from it the letter, from where to look.

    The first `old` tokens hold no stop string. One that further tokens complete ends
    behind what they are known to say: their letters but for unknown ones at the end,
    which may be a character's first bytes. So only `longest` letters before that count.
    """
    if old <= 0 or any(_UNKNOWN in one for one in stop):
        return 0, 0
    num = longest + _MARGIN
    while num < old:
        known = decode_text(tokens[old - num : old]).rstrip(_UNKNOWN)
        # Of unknown ones before, a further token could change none, but the cut has.
        sure = len(known) - 1 - known.rfind(_UNKNOWN)
        if sure >= longest + _MARGIN:
            return old - num, len(known) - longest
        num *= 2
    return 0, 0
