"""What drafted chains would have had accepted on texts that the target drew."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import noise, sampling
from tlt_jax.specdec.training import unroll
from tlt_jax.types import Array

RANKINGS = ("deterministic", "coupled")
# Sharpnesses that are tried; see `learned.Draft`.
SHARPNESSES = (1.0, 1.25, 1.5, 2.0, 3.0)
# Share of drafts that another sharpness must have accepted more than the one in use. A
# batch of some hundred bases tells them apart to one or two percent.
_LEAST_GAIN = 0.03
# Temperatures of the coupled score that are tried, rising in steps of the square root
# of two, from 0.18 to 11.
TAUS = tuple(2.0 ** (k / 2) for k in range(-5, 8))
_ERROR = "coupled_error"


def measure(
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    num_steps: int,
    *,
    cfg: unroll.ForwardConfig,
    seen: unroll.Seen | None = None,
    start: Array | int = 0,
    size: int | None = None,
) -> dict[str, Array]:
    """Count what chains drafted from every base would have had accepted.

    A text's token was the argmax of the target's log-probabilities plus the noise of
    its key and position. A deterministic draft is the drafter's likeliest token; a
    coupled one the argmax of the drafter's log-probabilities, times a sharpness, plus
    the same noise. Either is accepted where it is the text's token: this is no estimate
    of what the engine does, but the same. (Temperature 1 without truncation; texts
    drawn otherwise need their own law here.)

    Given the drafter's law and the noise, token v was drawn with the chance
    softmax((sharpness x logprobs + noise) / tau)[v] if the target's log-probabilities
    are the sharpened ones plus Gumbel noise of scale tau, which only the target knows.
    That is so at best roughly, and where some tokens were drawn of which the drafter
    knows nothing, the likeliest tau is too large for those that are drafted. What is
    wanted are drafts that come true as often as their scores say: the best tau has the
    smallest sum of squared differences between the two.

    Reference: Daliri et al., Coupling without Communication and Drafter-Invariant
    Speculative Decoding, 2024 (draft and target share the noise); Brier,
    Verification of Forecasts Expressed in Terms of Probability, 1950.

    See `unroll.unroll` for the arguments; `size` bases of each row from `start` on are
    counted, by themselves all. The sums over all are those of any parts.

    Returns:
      Sums `[U] float32`: `count` of the predictions; `deterministic` and `coupled`, the
      drafts among them that are the text's token, given the text's tokens before; and
      `deterministic_chain`, `coupled_chain`, those of them with no miss before. The
      coupled ones are `[U, n]`, by `SHARPNESSES`. `coupled_error [U, n, m]`, by `TAUS`
      as well, are the squared differences between a coupled draft's score and 1 where
      it is the text's token, else 0.
    """
    bases, chunk = _predictions(
        params, batch, target, num_steps, cfg, seen, start, size
    )

    def one_chunk(sums, start):
        here = count(bases.chunk(start, chunk), params, target)
        return {name: sums[name] + here[name] for name in sums}, None

    return lax.scan(one_chunk, nothing(num_steps), bases.starts(chunk))[0]


def nothing(num_steps: int) -> dict[str, np.ndarray]:
    """Return the sums of `measure` over no base."""
    zeros = {"count": np.zeros(num_steps, np.float32)}
    for name, rest in zip(RANKINGS, ((), (len(SHARPNESSES),)), strict=True):
        zero = np.zeros((num_steps, *rest), np.float32)
        zeros |= {name: zero, f"{name}_chain": zero}
    shape = (num_steps, len(SHARPNESSES), len(TAUS))
    return zeros | {_ERROR: np.zeros(shape, np.float32)}


def count(
    part: unroll.Predictions, params: drafter.DrafterParams, target: unroll.Target
) -> dict[str, Array]:
    """Count as `measure` does; the laws are tokens drawn, positions and keys."""
    sharpnesses = jnp.array(SHARPNESSES)
    of_level = _levels(part, params, target, sharpnesses)
    size = part.hidden.shape[2]
    # Whether every level of the chain up to this one was accepted, by base.
    alive = {
        "deterministic": jnp.ones((size,), bool),
        "coupled": jnp.ones((len(SHARPNESSES), size), bool),
    }

    def one_level(alive, u):
        hits = of_level(u)
        here = {
            "count": jnp.sum(part.exists[u]),
            _ERROR: jnp.sum(hits.pop(_ERROR), axis=-1),
        }
        alive = {name: alive[name] & hit for name, hit in hits.items()}
        for name, hit in hits.items():
            here[name] = jnp.sum(hit, axis=-1, dtype=jnp.float32)
            in_chain = jnp.sum(alive[name], axis=-1, dtype=jnp.float32)
            here[f"{name}_chain"] = in_chain
        return alive, here

    return lax.scan(one_level, alive, jnp.arange(part.hidden.shape[0]))[1]


def lifetimes(
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    num_steps: int,
    *,
    cfg: unroll.ForwardConfig,
) -> Array:
    """Count, for every base, what a coupled chain drafted from it would have accepted.

    So the accept length of every chain of up to `num_steps` levels is known at every
    position of a text, wherever its steps begin. The sharpness is the drafter's own.
    See `measure` for the arguments.

    Returns:
      `[B, M] int32`, 0 to `num_steps`: drafts accepted before the first miss or the end
      of the text; 0 where there is no base.
    """
    given = params.sharpness
    sharpness = drafter.SHARPNESS if given is None else given
    bases, chunk = _predictions(params, batch, target, num_steps, cfg)

    def one_chunk(_, start):
        part = bases.chunk(start, chunk)
        of_level = _levels(part, params, target, jnp.asarray(sharpness)[None])
        hits_UQ = lax.map(lambda u: of_level(u)["coupled"][0], jnp.arange(num_steps))
        return None, jnp.sum(jnp.cumprod(hits_UQ, axis=0), axis=0, dtype=jnp.int32)

    found = lax.scan(one_chunk, None, bases.starts(chunk))[1]
    num_rows, width = batch.bases.shape
    # As `unroll.predictions` laid them out.
    stride = width + num_steps - 1
    return found.reshape(-1)[: num_rows * stride].reshape(num_rows, stride)[:, :width]


def _predictions(
    params, batch, target, num_steps, cfg, seen=None, start=0, size=None
) -> tuple[unroll.Predictions, int]:
    """Unroll; the laws are the tokens drawn, their positions and keys.

    Second how many of the predictions are looked at at once.
    """
    if size is None:
        size = batch.bases.shape[1]
    # Step u of a base guesses the token behind the u-th base on, so that tokens are
    # needed of a few bases behind the last one, too.
    wide = unroll.bases_from(batch, start, size + num_steps - 1)
    narrow = unroll.bases_from(wide, 0, size)
    steps_DBM = unroll.unroll(params, narrow, target, num_steps, cfg=cfg, seen=seen)
    steps_DBM = tuple(drafter_head.for_head(params, cfg.drafter, x) for x in steps_DBM)
    drawn = (
        unroll.take(batch.tokens, wide.bases + 2),
        unroll.take(batch.positions, wide.bases) + 2,
        wide.keys,
    )
    chunk = min(cfg.head_chunk, wide.bases.size)
    exists_UBM = unroll.step_exists(wide, num_steps)[..., :size]
    return unroll.predictions(steps_DBM, exists_UBM, drawn, chunk), chunk


def _levels(part, params, target, sharpnesses) -> Callable[[Array], dict[str, Array]]:
    """Return what says, of a level, where its draft is the text's token.

    `deterministic [Q] bool`, `coupled [n, Q] bool` by sharpness, and the squared errors
    of its scores, `coupled_error [n, m, Q]`; where no prediction exists all are 0. It
    is asked for one level after the other, as it holds the scores of all tokens.
    """
    size, vocab_size = part.hidden.shape[2], target.embed.shape[0]
    drawn, positions, keys = part.laws
    # The noise that the tokens were drawn with, of the tokens that can be proposed.
    if target.draft_ids is None:
        gumbel = noise.gumbel(keys, positions, vocab_size)
    else:
        gumbel = noise.gumbel_at(keys, positions, target.draft_ids, vocab_size)
    head_VD = drafter_head.head_of(params, target.head)

    def of_level(u):
        here_QV = lax.dynamic_slice_in_dim(gumbel, u, size)
        wanted_Q = lax.dynamic_slice_in_dim(drawn, u, size)
        exists_Q = part.exists[u] > 0
        logits_QV = transformer.head_logits(head_VD, part.hidden[u])

        def is_hit(scores_QV):
            guessed_Q = sampling.argmax(scores_QV)
            if target.draft_ids is not None:
                guessed_Q = target.draft_ids[guessed_Q]
            return (guessed_Q == wanted_Q) & exists_Q

        def coupled(sharpness):
            scores_QV = logits_QV * sharpness + here_QV
            hit_Q = is_hit(scores_QV)
            return hit_Q, jnp.square(_chances(scores_QV) - hit_Q)

        hits_NQ, errors_NMQ = lax.map(coupled, sharpnesses)
        return {
            "deterministic": is_hit(logits_QV),
            "coupled": hits_NQ,
            _ERROR: jnp.where(exists_Q, errors_NMQ, 0.0),
        }

    return of_level


def _chances(scores: Array) -> Array:
    """Give the best of `[Q, V]` its share by each of `TAUS`, `[m, Q]`."""
    below_QV = scores - jnp.max(scores, axis=-1, keepdims=True)
    # Two exponentials are enough: half a temperature squares what is summed.
    weights = [jnp.exp(below_QV / tau) for tau in TAUS[:-3:-1]]
    while len(weights) < len(TAUS):
        weights.append(jnp.square(weights[-2]))
    # The best one's weight is 1.
    return jnp.stack([1 / jnp.sum(x_QV, axis=-1) for x_QV in reversed(weights)])


def summarise(
    sums: dict[str, Array], sharpness: float | None = None
) -> dict[str, list[float] | float]:
    """Turn sums into rates by depth and accept lengths.

    Args:
      sums: of `measure`, added up over batches.
      sharpness: the one in use, which is kept unless another one is better by more than
        a few texts say by chance; None: there is none.

    Returns:
      `<ranking>/rate_by_depth`: of the drafts at each depth, given the text's tokens
      before; `<ranking>/accept_length`: drafts accepted from a base on before the first
      miss, plus the token that the target adds; `sharpness`: the best one for coupled
      drafts, with which theirs are given; `tau`: the best with that sharpness.
    """
    counts = [float(x) for x in sums["count"]]
    chains = np.sum(np.asarray(sums["coupled_chain"]), axis=0)
    # Of equally good ones the one that changes least.
    best = int(np.argmax(chains))
    if sharpness in SHARPNESSES:
        used = SHARPNESSES.index(sharpness)
        best = best if chains[best] > (1 + _LEAST_GAIN) * chains[used] else used
    # Which draft is best does not depend on tau: acceptance chooses the one, how true
    # scores come the other.
    out: dict[str, list[float] | float] = {
        "sharpness": SHARPNESSES[best],
        "tau": _truest(np.sum(np.asarray(sums[_ERROR])[:, best], axis=0)),
    }
    for name in RANKINGS:
        hits, chain = (np.asarray(sums[x]) for x in (name, f"{name}_chain"))
        if name == "coupled":
            hits, chain = hits[:, best], chain[:, best]
        rates = zip(hits, counts, strict=True)
        out[f"{name}/rate_by_depth"] = [float(x) / max(n, 1.0) for x, n in rates]
        accepted = float(np.sum(chain))
        out[f"{name}/accept_length"] = 1.0 + accepted / max(counts[0], 1.0)
    return out


def _truest(errors: np.ndarray) -> float:
    """Find tau by the errors `[m]` at `TAUS`, smallest first of equal ones.

    Between them it is the vertex of a parabola through the best and its neighbours.
    """
    # No text, or a drafter whose numbers are none.
    if not 0 < np.sum(errors) < np.inf:
        return drafter.TAU
    best = int(np.argmin(errors))
    if best in (0, len(TAUS) - 1):
        return TAUS[best]
    before, here, after = np.asarray(errors[best - 1 : best + 2], np.float64)
    offset = (before - after) / (2 * (before - 2 * here + after))
    return float(TAUS[best] * 2 ** (offset / 2))
