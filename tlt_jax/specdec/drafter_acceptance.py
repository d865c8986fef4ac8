"""What drafted chains would have had accepted on texts that the target drew."""

import jax
import jax.numpy as jnp
from jax import lax

from tlt_jax.models import drafter, transformer
from tlt_jax.specdec import drafter_unroll, noise
from tlt_jax.types import Array

RANKINGS = ("deterministic", "coupled")


def measure(
    params: drafter.DrafterParams,
    batch: drafter_unroll.Batch,
    target: drafter_unroll.Target,
    num_steps: int,
    *,
    cfg: drafter_unroll.ForwardConfig,
) -> dict[str, Array]:
    """Count what chains drafted from every base would have had accepted.

    A text's token was the argmax of the target's log-probabilities plus the noise of
    its key and position. A deterministic draft is the drafter's likeliest token; a
    coupled one the argmax of the drafter's log-probabilities plus the same noise.
    Either is accepted where it is the text's token: this is no estimate of what the
    engine does, but the same. (Temperature 1 without truncation; texts drawn
    otherwise need their own law here.)

    Reference: Daliri et al., Coupling without Communication and Drafter-Invariant
    Speculative Decoding, 2024 (draft and target share the noise).

    Args:
      params: the drafter.
      batch: rows of texts, with the keys that they were drawn with.
      target: embedding and head.
      num_steps: K, levels drafted.
      cfg: how.

    Returns:
      Sums `[K] float32`: `count` of the predictions; `deterministic` and `coupled`, the
      drafts among them that are the text's token, given the text's tokens before; and
      `deterministic_chain`, `coupled_chain`, those of them with no miss before.
    """
    steps = drafter_unroll.unroll(params, batch, target, num_steps, cfg=cfg)
    exists = drafter_unroll.step_exists(batch, num_steps)
    drawn = (
        drafter_unroll.take(batch.tokens, batch.bases + 2),
        drafter_unroll.take(batch.positions, batch.bases) + 2,
        batch.keys,
    )
    size = cfg.head_chunk
    predictions = drafter_unroll.predictions(steps, exists, drawn, size)

    def one_chunk(sums, start):
        part = predictions.chunk(start, size)
        drawn, positions, keys = part.laws
        gumbel = noise.gumbel(keys, positions, target.embed.shape[0])
        if target.draft_ids is not None:
            gumbel = gumbel[:, target.draft_ids]
        here = {name: [] for name in sums}
        alive = dict.fromkeys(RANKINGS, True)
        for k in range(num_steps):
            logits = transformer.head_logits(target.head, part.hidden[k])
            here["count"].append(jnp.sum(part.exists[k]))
            scores = {"deterministic": logits, "coupled": logits + gumbel[k : k + size]}
            for name in RANKINGS:
                best = jnp.argmax(scores[name], axis=-1)
                if target.draft_ids is not None:
                    best = target.draft_ids[best]
                hit = (best == drawn[k : k + size]) & (part.exists[k] > 0)
                alive[name] = alive[name] & hit
                here[name].append(jnp.sum(hit, dtype=jnp.float32))
                in_chain = jnp.sum(alive[name], dtype=jnp.float32)
                here[f"{name}_chain"].append(in_chain)
        sums = {name: sums[name] + jnp.stack(here[name]) for name in sums}
        return sums, None

    names = ("count", *RANKINGS, *(f"{name}_chain" for name in RANKINGS))
    zeros = {name: jnp.zeros(num_steps, jnp.float32) for name in names}
    return lax.scan(one_chunk, zeros, predictions.starts(size))[0]


def summarise(sums: dict[str, Array]) -> dict[str, list[float] | float]:
    """Turn sums into rates by depth and accept lengths.

    Args:
      sums: of `measure`, added up over batches.

    Returns:
      `<ranking>/rate_by_depth`: of the drafts at each depth, given the text's tokens
      before; `<ranking>/accept_length`: drafts accepted from a base on before the first
      miss, plus the token that the target adds.
    """
    counts = [float(x) for x in sums["count"]]
    out: dict[str, list[float] | float] = {}
    for name in RANKINGS:
        rates = zip(sums[name], counts, strict=True)
        out[f"{name}/rate_by_depth"] = [float(x) / max(n, 1.0) for x, n in rates]
        accepted = sum(float(x) for x in sums[f"{name}_chain"])
        out[f"{name}/accept_length"] = 1.0 + accepted / max(counts[0], 1.0)
    return out


def add(left: dict[str, jax.Array], right: dict[str, jax.Array]) -> dict:
    """Add the sums of two batches."""
    return jax.tree.map(jnp.add, left, right)
