"""What a block drafter has beside its layer: masks, and a head of the token before.

The layer guesses K tokens behind a text in one pass. A column of the drafter's input
guesses one token, see `drafter`; the last column that has a feature of the target, the
root, guesses the first token behind the pending one. Behind the root stand K - 1 masks:
mask j is the root's column at the rotary position j further on, with a learned vector
added to what the layer reads, and guesses the token j places further on. Masks see what
the root sees, the root, and one another; nothing but masks sees them.

So far each law is a marginal one, whatever the tokens before it are. With the token
before, a vector of low rank is added to what the head multiplies: to logits that is a
matrix of token by token, of that rank, and the same at all places.

References: Chen, Liang and Liu, DFlash, 2026 (masks that a pass fills from the target's
features); here laws are conditional, and guesses are coupled to the target's noise.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax.models import layers
from tlt_jax.models import params as model_params
from tlt_jax.types import Array

# A pass has twice as many columns at most, and kernels mask 128 of them.
MOST = 32
_MOST_RANK = 64


@struct.dataclass
class BlockParams:
    """Weights of a block beside the layer.

    Attributes:
      masks: `[K - 1, D]`, or None where K is 1.
      markov_in: `[R, D]`, from the embedding of the token before.
      markov_out: `[D, R]`, to what the head multiplies.
    """

    masks: jax.Array | None
    markov_in: jax.Array
    markov_out: jax.Array


def rank_of(d_model: int) -> int:
    """Choose R for a new drafter of D features."""
    return min(_MOST_RANK, d_model)


def check(block_size: int, markov_rank: int, d_model: int, *, is_block: bool) -> None:
    """Refuse sizes that a drafter cannot have, which `is_block` or none.

    Raises:
      ValueError: naming them, K or R, or D features, and what is accepted.
    """
    sizes = f"block_size={block_size}, markov_rank={markov_rank}"
    if not is_block:
        if block_size or markov_rank:
            raise ValueError(f"{sizes} are of architecture='block' alone: give 0.")
        return
    if not 1 <= block_size <= MOST:
        raise ValueError(
            f"block_size={block_size}: a pass of architecture='block' guesses 1 to "
            f"{MOST} tokens."
        )
    if not 1 <= markov_rank <= d_model:
        raise ValueError(f"markov_rank={markov_rank}: 1 to {d_model}, the features.")


def describe(block_size: int, markov_rank: int, d_model: int) -> BlockParams:
    """Describe the weights of K, R and D; at first no token changes a law."""
    masks = (block_size - 1, d_model)
    inward, outward = (markov_rank, d_model), (d_model, markov_rank)
    return BlockParams(
        # As large as what they are added to.
        masks=model_params.Weight(masks, (None, None), "normal") if masks[0] else None,
        markov_in=model_params.Weight(inward, (None, "embed"), "normal", d_model),
        markov_out=model_params.Weight(outward, ("embed", None), "zeros"),
    )


def masks_of(params: BlockParams, numbers: Array, dtype) -> Array:
    """Return what is added to columns, `[D, *shape]` of `numbers [*shape] int32`.

    Number j is mask j, 1 to K - 1, and 0 a column that is none: nothing is added.
    """
    outward = params.markov_out
    masks = jnp.zeros((1, outward.shape[0]), outward.dtype)
    if params.masks is not None:
        masks = jnp.concatenate([masks, params.masks])
    return jnp.moveaxis(masks.astype(dtype)[numbers], -1, 0)


def code_of(params: BlockParams, embedded: Array, eps: float) -> Array:
    """Return what tokens say of the next ones, `[R, B, T]`.

    Their embeddings `[D, B, T]` are divided by the root mean square, `eps` added to its
    square.
    """
    unit = layers.rms_norm(embedded, jnp.ones(embedded.shape[0]), eps)
    return layers.product(params.markov_in, unit)


def follow(params: BlockParams, hidden: Array, code: Array) -> Array:
    """Add to features `[D, B, T]` what `code_of` the tokens before says."""
    return hidden + layers.product(params.markov_out, code)


def to_logits(params: BlockParams, head: Array) -> Array:
    """Multiply a head `[Vd, D]` by what `follow` adds; `[Vd, R]` of the same dtype."""
    outward = params.markov_out.astype(head.dtype)
    return jnp.matmul(head, outward, precision=layers.precision(head.dtype))


def seen(block_size: int) -> Array:
    """Say which columns of its block each sees, `[K, K] bool`.

    The root sees itself; masks see the root and one another.
    """
    index = jnp.arange(block_size)
    return (index[None, :] == 0) | (index[:, None] > 0)
