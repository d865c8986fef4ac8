"""Which of the target's tokens a drafter can propose: those that it will write most."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models import transformer
from tlt_jax.specdec.texts import layout
from tlt_jax.types import Array

# Laws that tell `expected`, and how many are held at once.
_MOST, _CHUNK = 16384, 256


def choose(weights: np.ndarray, size: int, always: Sequence[int] = ()) -> np.ndarray:
    """Choose the tokens of the largest weights.

    Args:
      weights: `[V]`, at least 0, see `drawn` and `expected`; of equal ones the first.
      size: Vd.
      always: ids that are taken whatever their weight, such as EOS.

    Returns:
      `[Vd] int32`, rising.

    Raises:
      ValueError: `size` cannot hold `always`, or exceeds the vocabulary.
    """
    if not max(len(always), 1) <= size <= len(weights):
        raise ValueError(
            f"draft_vocab_size={size} is not in [{max(len(always), 1)}, "
            f"{len(weights)}]: it holds the tokens that end a text, and the vocabulary "
            "has no more."
        )
    wanted = np.array(weights, np.float64)
    wanted[list(always)] = np.inf
    chosen = np.argsort(-wanted, kind="stable")[:size]
    return np.sort(chosen).astype(np.int32)


def drawn(texts: Sequence[layout.Record], vocab_size: int) -> np.ndarray:
    """Count the tokens of the texts' responses, `[V] int64`."""
    tokens = np.concatenate([r.tokens[r.response_start :] for r in texts])
    return np.bincount(tokens, minlength=vocab_size)


def expected(texts: Sequence[layout.Record], head: Array) -> np.ndarray:
    """Sum the target's laws (temperature 1) along the texts' responses, `[V] float64`.

    They say of tokens that were not drawn, too, how often they will be. `head [V, D]`
    is the target's. Of many texts every k-th position is taken.
    """
    hidden = [r.hidden[r.response_start - 1 : len(r.tokens) - 1] for r in texts]
    hidden_QD = np.concatenate(hidden)
    hidden_QD = hidden_QD[:: -(-len(hidden_QD) // _MOST)]
    total = np.zeros(len(head))
    for start in range(0, len(hidden_QD), _CHUNK):
        part_QD = hidden_QD[start : start + _CHUNK].astype(np.float32)
        missing = _CHUNK - len(part_QD)
        counts_Q = np.arange(_CHUNK) < len(part_QD)
        part_QD = np.pad(part_QD, ((0, missing), (0, 0)))
        total += np.asarray(_sum_of_laws(head, part_QD, counts_Q), np.float64)
    return total


@jax.jit
def _sum_of_laws(head: Array, hidden_QD: Array, counts_Q: Array) -> Array:
    logits_QV = transformer.head_logits(head, hidden_QD.T)
    return jnp.where(counts_Q, 1.0, 0.0) @ jax.nn.softmax(logits_QV)
