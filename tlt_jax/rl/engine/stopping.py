"""Why a row is finished, and where a stop string cuts it."""

from collections.abc import Callable, Sequence

from tlt_jax import types
from tlt_jax.rl.engine import scheduler


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

    Returns:
      The reason, or None.
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
    for length in range(len(tokens) - num_new + 1, len(tokens) + 1):
        if any(s in decode_text(tokens[:length]) for s in stop):
            return length
    return len(tokens)
