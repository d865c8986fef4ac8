"""What each rule accepts of drafted chains, told by texts that the target drew.

So the rules are compared on the same texts, though each would write other ones.

By the keyed rule it is a count, as in `acceptance`. By the rules for sampled drafts it
is a mean over chains that the drafter might draw. Along a chain x_1, x_2, .. let r_i be
q_i(x_i) / p_i(x_i), the drafter's chance of a token by the target's, given those before
it. Rejection keeps k drafts or more with the product of min(1, 1 / r_i), i up to k, and
block verification with w_k = min(1, w_{k-1} / r_k), where w_0 = 1. A mean over chains
of the drafter is one over texts of the target, each weighted with r_1 x .. x r_k:

    rejection   the mean of min(1, r_1) x .. x min(1, r_k)
    block       the mean of min(1, r_1, r_1 x r_2, .., r_1 x .. x r_k)

Neither asks for a token that the drafter drew, and neither exceeds 1. The drafter may
draw from any law, such as a sharpened one.

References: Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
2023; Sun et al., Block Verification Accelerates Speculative Decoding, 2024 (w_k).
"""

import jax
import jax.numpy as jnp
from jax import lax

from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import noise, sampling
from tlt_jax.specdec.training import unroll
from tlt_jax.types import Array

# By the names of `chain.RULES`.
RULES = ("keyed", "rejection", "block")
# The same where drafts are drawn from the drafter's law to the power of its sharpness.
SHARPENED = ("rejection_sharpened", "block_sharpened")


def kept(log_ratios: Array) -> dict[str, Array]:
    """Give the weights whose means over texts say how often k drafts are kept.

    Args:
      log_ratios: `[U, ...] float32`, log r_1 .. log r_U; -inf where the drafter cannot
        propose the token.

    Returns:
      `rejection` and `block`, `[U, ...] float32` in [0, 1]: place k - 1 is of k.
    """
    running = jnp.cumsum(log_ratios, axis=0)
    least = lax.associative_scan(jnp.minimum, running, axis=0)
    return {
        "rejection": jnp.exp(jnp.cumsum(jnp.minimum(log_ratios, 0.0), axis=0)),
        "block": jnp.exp(jnp.minimum(least, 0.0)),
    }


def measure(
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    head: Array,
    num_steps: int,
    *,
    cfg: unroll.ForwardConfig,
) -> dict[str, Array]:
    """Sum what chains drafted from every base would have had accepted, by rule.

    The texts were drawn by the target's own law, temperature 1 without truncation, with
    the noise of their keys. Coupled drafts are those of the drafter's own sharpness.

    Args:
      params, batch, target, num_steps, cfg: see `unroll.unroll`.
      head: `[V, D]`, the target's, of all tokens.

    Returns:
      Sums `[U] float32`: `count` of the predictions that exist; by rule, those among
      them that are kept with all before them, also with drafts of `SHARPENED` laws; and
      `overlap`, of the two laws given the text's tokens before, 1 - total variation.
    """
    width = batch.bases.shape[1]
    wide = unroll.bases_from(batch, 0, width + num_steps - 1)
    narrow = unroll.bases_from(wide, 0, width)
    steps_DBM = unroll.unroll(params, narrow, target, num_steps, cfg=cfg)
    steps_DBM = tuple(drafter_head.for_head(params, cfg.drafter, x) for x in steps_DBM)
    # Step 0 of a base predicts the law one column on.
    ahead_BM = jnp.minimum(wide.bases + 1, batch.tokens.shape[1] - 1)
    laws = (
        unroll.take(batch.tokens, wide.bases + 2),
        unroll.take(batch.positions, wide.bases) + 2,
        wide.keys,
        jnp.take_along_axis(batch.hidden, ahead_BM[..., None], axis=1),
    )
    chunk = min(cfg.head_chunk, wide.bases.size)
    exists_UBM = unroll.step_exists(wide, num_steps)[..., :width]
    bases = unroll.predictions(steps_DBM, exists_UBM, laws, chunk)

    def one_chunk(sums, start):
        here = _sums(bases.chunk(start, chunk), params, target, head, cfg)
        return jax.tree.map(jnp.add, sums, here), None

    names = ("count", *RULES, *SHARPENED, "overlap")
    zeros = {name: jnp.zeros(num_steps, jnp.float32) for name in names}
    return lax.scan(one_chunk, zeros, bases.starts(chunk))[0]


def _sums(part, params, target, head, cfg) -> dict[str, Array]:
    """Sum over the bases of a chunk."""
    num_steps, _, size = part.hidden.shape
    drawn_Q, positions_Q, keys_Q, law_QD = part.laws
    vocab_size, ids = target.embed.shape[0], target.draft_ids
    target_QV = transformer.head_logits(head, law_QD.T.astype(cfg.dtype))
    target_QV = jax.nn.log_softmax(target_QV)
    # Where among the tokens that can be proposed the drawn one is, if it is.
    place_Q, known_Q, gumbel_QV = drawn_Q, True, None
    if ids is None:
        gumbel_QV = noise.gumbel(keys_Q, positions_Q, vocab_size)
    else:
        place_Q = jnp.minimum(jnp.searchsorted(ids, drawn_Q), len(ids) - 1)
        known_Q = ids[place_Q] == drawn_Q
        gumbel_QV = noise.gumbel_at(keys_Q, positions_Q, ids, vocab_size)
    there_Q = _at(target_QV, drawn_Q)
    if ids is not None:
        target_QV = target_QV[:, ids]
    sharpness = params.sharpness
    sharpness = drafter.SHARPNESS if sharpness is None else sharpness
    head_VD = drafter_head.head_of(params, target.head)
    ratios, sharpened, hits, overlaps = [], [], [], []

    def ratio_of(draft_QV, here):
        ratio_Q = _at(draft_QV, place_Q[here]) - there_Q[here]
        return ratio_Q if ids is None else jnp.where(known_Q[here], ratio_Q, -jnp.inf)

    for u in range(num_steps):
        here = slice(u, u + size)
        draft_QV = jax.nn.log_softmax(transformer.head_logits(head_VD, part.hidden[u]))
        ratios.append(ratio_of(draft_QV, here))
        sharp_QV = sharpness * draft_QV
        sharpened.append(ratio_of(jax.nn.log_softmax(sharp_QV), here))
        guess_Q = sampling.argmax(sharp_QV + gumbel_QV[here])
        hit_Q = guess_Q == place_Q[here]
        if ids is not None:
            hit_Q = hit_Q & known_Q[here]
        hits.append(hit_Q.astype(jnp.float32))
        common_QV = jnp.exp(jnp.minimum(draft_QV, target_QV[here]))
        overlaps.append(jnp.sum(common_QV, axis=-1))
    weights = kept(jnp.stack(ratios))
    of_sharpened = kept(jnp.stack(sharpened))
    weights |= {f"{name}_sharpened": x for name, x in of_sharpened.items()}
    weights["keyed"] = jnp.cumprod(jnp.stack(hits), axis=0)
    weights["overlap"] = jnp.stack(overlaps)
    # What does not exist may be anything.
    sums = {
        name: jnp.sum(jnp.where(part.exists > 0, value, 0.0), axis=1)
        for name, value in weights.items()
    }
    return sums | {"count": jnp.sum(part.exists, axis=1)}


def _at(scores: Array, places: Array) -> Array:
    """Take an entry of each row of `[Q, V]`."""
    return jnp.take_along_axis(scores, places[:, None], axis=-1)[:, 0]


def accept_lengths(sums: dict[str, Array]) -> dict[str, float]:
    """Turn sums of `measure`, added up over batches, into accept lengths by rule.

    Drafts accepted from a base on, in the mean, plus the token that the target adds.
    """
    bases = max(float(sums["count"][0]), 1.0)
    return {
        name: 1.0 + float(jnp.sum(sums[name])) / bases for name in (*RULES, *SHARPENED)
    }
