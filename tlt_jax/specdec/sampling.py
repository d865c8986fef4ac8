"""From logits to the sampling law, and from the law to tokens.

`law` is the one function between logits and log-probabilities: sampler, verifier,
log-prob reporter and trainer all call it, so none of them can truncate or temper
differently. Order: temperature, top-k, top-p, min-p, renormalisation.

A token is `argmax_v(logprobs[v] + gumbel(seed, r, t)[v])`, an exact sample of the law
that depends on the request and the position alone.

Reference: Gumbel, Statistical Theory of Extreme Values, 1954 (the maximum property);
Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p); Nguyen et
al., Turning Up the Heat: Min-p Sampling, 2024.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import kernels as kernels_lib
from tlt_jax.settings import schema, sections
from tlt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The sampling law's settings.

    Attributes:
      temperature: divides the logits; 0 is the point mass on the largest.
      top_k: keep the k likeliest tokens and those equal to the last of them; 0: all.
      top_p: keep a token if the likelier ones together have less than this; 1: all.
      min_p: keep tokens with at least this fraction of the largest probability; 0: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        schema.check_like(sections.Sampling, self)


@struct.dataclass
class Law:
    """A distribution over the vocabulary.

    Attributes:
      scores: `[..., V] float32`, log-probabilities up to `log_normaliser`; -inf outside
        the support.
      log_normaliser: `[...] float32`.
    """

    scores: Array
    log_normaliser: Array

    def logprobs(self) -> Array:
        """Natural log-probabilities, `[..., V]`."""
        return self.scores - self.log_normaliser[..., None]

    def logprob_of(self, tokens: Array) -> Array:
        """Log-probabilities `[...]` of `tokens [...] int32`."""
        chosen = jnp.take_along_axis(self.scores, tokens[..., None], axis=-1)[..., 0]
        return chosen - self.log_normaliser

    def entropy(self) -> Array:
        """Entropy in nats, `[...]`."""
        logprobs = self.logprobs()
        inside = jnp.isfinite(logprobs)
        safe = jnp.where(inside, logprobs, 0.0)
        return -jnp.sum(jnp.where(inside, jnp.exp(safe) * safe, 0.0), axis=-1)

    def draw(
        self,
        noise: Array,
        which: Array | None = None,
        kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
    ) -> Array:
        """Draw tokens `[...] int32`.

        Args:
          noise: Gumbel noise, one row `[..., V]` for each of the law's; or `[B, A, V]`
            of which the laws, `[B, W, V]`, take what `which` says. One column stands
            for V equal ones.
          which: `[B, W] int32`, within [0, A).
          kernels: whose own draw adds and compares in one go.
        """
        if kernels.draw is not None and noise.shape[-1] == self.scores.shape[-1]:
            return self._draw_rows(noise, which, kernels.draw)
        if which is not None:
            noise = jnp.take_along_axis(noise, which[..., None], axis=1)
        return argmax(self.scores + noise)

    def _draw_rows(self, noise, which, draw) -> Array:
        """Draw by a kernel that is told for each row of scores its row of noise."""
        shape = self.scores.shape
        if which is None:
            rows = jnp.arange(math.prod(shape[:-1]), dtype=jnp.int32)
        else:
            first = noise.shape[1] * jnp.arange(shape[0], dtype=jnp.int32)
            rows = (first[:, None] + which).reshape(-1)
        scores, noise = (x.reshape(-1, shape[-1]) for x in (self.scores, noise))
        return draw(scores, noise, rows).reshape(shape[:-1])


def law(logits: Array, cfg: SamplingConfig) -> Law:
    """Turn logits, `[..., V] float32`, into the sampling law.

    At temperature 0 it is the point mass on the first largest logit.
    """
    if cfg.temperature == 0:
        best = argmax(logits)
        here = jnp.arange(logits.shape[-1]) == best[..., None]
        return Law(jnp.where(here, 0.0, -jnp.inf), jnp.zeros(best.shape, logits.dtype))
    scores = logits if cfg.temperature == 1.0 else logits / cfg.temperature
    if cfg.top_k and cfg.top_k < logits.shape[-1]:
        best = lax.top_k(scores, cfg.top_k)[0]
        scores = jnp.where(scores >= best[..., -1:], scores, -jnp.inf)
    if cfg.top_p < 1:
        scores = _keep_top_p(scores, cfg.top_p)
    if cfg.min_p > 0:
        floor = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(cfg.min_p)
        scores = jnp.where(scores >= floor, scores, -jnp.inf)
    return Law(scores, log_sum_exp(scores))


def log_sum_exp(scores: Array) -> Array:
    """Log of the sum of exponentials over the vocabulary, `[..., V]` to `[...]`."""
    largest = lax.stop_gradient(_fold(scores, jnp.max))
    return largest + jnp.log(_fold(jnp.exp(scores - largest[..., None]), jnp.sum))


def argmax(scores: Array) -> Array:
    """Index of the first largest entry over the vocabulary, `[..., V]` to `[...]`.

    Two plain reductions: compilers vectorise them, and not the paired one. Where an
    entry is NaN the index is the last one: nothing beyond the vocabulary comes out.
    """
    num = scores.shape[-1]
    # Materialised, so that the second reduction does not make the scores again.
    scores = lax.optimization_barrier(scores)
    largest = _fold(scores, jnp.max)
    ids = jnp.arange(num, dtype=jnp.int32)
    return _fold(jnp.where(scores == largest[..., None], ids, num - 1), jnp.min)


def _fold(x: Array, reduce) -> Array:
    """Reduce over the last axis, in lanes first: a reduction that vectorises."""
    lanes = 64
    if x.shape[-1] % lanes:
        return reduce(x, axis=-1)
    return reduce(reduce(x.reshape(*x.shape[:-1], -1, lanes), axis=-2), axis=-1)


def _keep_top_p(scores: Array, top_p: float) -> Array:
    # The numbers alone: to keep the order of equal ones, which nobody can tell apart,
    # GPUs would sort their indices as well.
    descending = -lax.sort(-scores, is_stable=False)
    probs = jnp.exp(descending - log_sum_exp(descending)[..., None])
    likelier = jnp.cumsum(probs, axis=-1) - probs
    num_kept = jnp.sum(likelier < top_p, axis=-1, keepdims=True)
    cutoff = jnp.take_along_axis(descending, jnp.maximum(num_kept - 1, 0), axis=-1)
    return jnp.where(scores >= cutoff, scores, -jnp.inf)
