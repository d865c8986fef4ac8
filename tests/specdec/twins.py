"""Slow forms of what `specdec` computes, for its tests to compare with."""

import numpy as np


def law(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probabilities of one row, `[V] float64`, token by token as documented."""
    num = len(logits)
    if temperature == 0:
        logprobs = np.full(num, -np.inf)
        logprobs[np.argmax(logits)] = 0.0
        return logprobs
    scores = np.asarray(logits, np.float64) / temperature
    kept = np.isfinite(scores)
    if 0 < top_k < num:
        last = np.sort(scores)[-top_k]
        kept = kept & (scores >= last)
    if top_p < 1:
        probs = _normalise(scores, kept)
        likelier = [probs[kept & (scores > scores[v])].sum() for v in range(num)]
        kept = kept & (np.array(likelier) < top_p)
    if min_p > 0:
        probs = _normalise(scores, kept)
        kept = kept & (probs >= min_p * probs.max())
    with np.errstate(divide="ignore"):
        return np.log(_normalise(scores, kept))


def _normalise(scores, kept):
    weights = np.where(kept, np.exp(scores - scores[kept].max()), 0.0)
    return weights / weights.sum()
