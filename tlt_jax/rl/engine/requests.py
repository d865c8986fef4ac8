"""What may be asked of a rollout engine."""

from collections.abc import Sequence

import numpy as np

from tlt_jax import types


def check(requests: Sequence[types.Request], vocab_size: int, max_length: int) -> None:
    """Refuse requests that an engine cannot answer.

    Args:
      requests: of one run.
      vocab_size: the target's.
      max_length: longest text in positions that the engine was made for.

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
        longest = len(request.prompt) + request.max_new_tokens
        if request.max_new_tokens < 1:
            raise ValueError(
                f"request {request.request_id} asks for max_new_tokens="
                f"{request.max_new_tokens}: at least 1."
            )
        if longest > max_length:
            raise ValueError(
                f"request {request.request_id} has a prompt of "
                f"{len(request.prompt)} tokens and asks for up to "
                f"{request.max_new_tokens} more, but the engine was made for "
                f"{max_length} in all: shorten it or raise "
                "task.max_prompt_tokens."
            )
