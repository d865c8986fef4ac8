"""Position-keyed Gumbel noise: the randomness of a token is a pure function of its key.

The noise of request r at position t over the vocabulary depends on (seed, r, t) alone:
not on the batch, the slot, the step or the program. It is made by a counter-based
generator written here, so that it stays the same across versions of jax.

Reference: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3,
2011 (Threefry-2x32; 13 rounds are the fewest that pass its statistical batteries).
"""

import jax.numpy as jnp
import numpy as np

from tlt_jax.models import kernels as kernels_lib
from tlt_jax.types import Array

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
ROUNDS = 13


def threefry2x32(
    key: tuple[Array, Array], counter: tuple[Array, Array], rounds: int = ROUNDS
) -> tuple[Array, Array]:
    """Encrypt a counter of two words under a key of two, in `rounds` of mixing.

    All are uint32 and broadcast to the shape of the two independent uniform words that
    come out.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for i in range(rounds):
        turn = np.uint32(_ROTATIONS[i % 8])
        x0 = x0 + x1
        x1 = (x1 << turn) | (x1 >> (np.uint32(32) - turn))
        x1 = x1 ^ x0
        if i % 4 == 3:
            step = i // 4 + 1
            x0 = x0 + schedule[step % 3]
            x1 = x1 + schedule[(step + 1) % 3] + np.uint32(step)
    return x0, x1


def split_words(value: int) -> tuple[np.uint32, np.uint32]:
    """Split a non-negative 64-bit integer into (high, low) words."""
    if not isinstance(value, int | np.integer) or not 0 <= value < 2**64:
        raise ValueError(
            f"key word {value!r} is not an integer in [0, 2**64): seeds and request "
            "ids are non-negative 64-bit integers."
        )
    value = int(value)
    return np.uint32(value >> 32), np.uint32(value & 0xFFFFFFFF)


def request_keys(seed: int, request_ids) -> np.ndarray:
    """Derive the key of each request from the run's seed: `[B, 2] uint32`, on the host.

    Seed and ids are in [0, 2**64).

    Raises:
      ValueError: the seed or an id is no integer, or out of range.
    """
    # One by one: converting an array would wrap negative ids and cut fractions off.
    counters = [split_words(request_id) for request_id in request_ids]
    high, low = np.array(counters, np.uint32).reshape(-1, 2).T
    with np.errstate(over="ignore"):
        words = threefry2x32(split_words(seed), (high, low), rounds=20)
    return np.stack(words, axis=-1)


def gumbel(
    keys: Array,
    positions: Array,
    vocab_size: int,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Array:
    """Draw the standard Gumbel noise of every vocabulary entry.

    With u uniform on a grid of 2**-31, -log1p(-u) is exponential with a fine lower
    tail, and minus its log is Gumbel with the upper tail that decides rare tokens
    (largest value 22).

    Args:
      keys: `[N, 2] uint32` of requests.
      positions: `[N] int32`, index in the row's text (prompt included) of the token
        that is drawn.
      vocab_size: V.
      kernels: whose own noise is made from the same bits, with other roundings of the
        logarithms (at most 1e-6 apart).

    Returns:
      `[N, V] float32`.
    """
    if kernels.noise is not None:
        return kernels.noise(keys, positions, vocab_size)
    if kernels.splits_vocab:
        # Every device makes both halves for its part, and none needs another's.
        ids = jnp.arange(vocab_size, dtype=jnp.uint32)
        return gumbel_at(keys, positions, ids, vocab_size)
    half = (vocab_size + 1) // 2
    words = _vocabulary_words(keys, positions, jnp.arange(half, dtype=jnp.uint32))
    return _gumbel_of(jnp.concatenate(words, axis=1)[:, :vocab_size])


def gumbel_at(keys: Array, positions: Array, ids: Array, vocab_size: int) -> Array:
    """Draw the same noise as `gumbel`, of the entries `ids [n] int32` alone, `[N, n]`.

    See there for the arguments.
    """
    half = (vocab_size + 1) // 2
    words = _vocabulary_words(keys, positions, ids % half)
    return _gumbel_of(jnp.where(ids < half, *words))


def _vocabulary_words(keys: Array, positions: Array, ids: Array) -> tuple[Array, Array]:
    """Words `[N, n]` of vocabulary entries `ids [n]`, and of those half a V behind."""
    counter = positions.astype(jnp.uint32)[:, None], ids.astype(jnp.uint32)
    return threefry2x32((keys[:, :1], keys[:, 1:]), counter)


def _gumbel_of(bits: Array) -> Array:
    # 31 bits fit a signed integer, whose conversion every vector unit has.
    u = ((bits >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31
    u = jnp.minimum(u, 1.0 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))


def uniform(keys: Array, positions: Array) -> Array:
    """Draw `[N] float32` uniform on a grid of 2**-24 in [0, 1); see `gumbel`."""
    zero = jnp.zeros(positions.shape, jnp.uint32)
    counter = (positions.astype(jnp.uint32), zero)
    bits, _ = threefry2x32((keys[:, 0], keys[:, 1]), counter)
    return (bits >> np.uint32(8)).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def step_keys(keys: Array, lengths: Array, num: int) -> Array:
    """Derive keys for chance that belongs to one step of a row, and not to a position.

    The counters have the top bit, which no position has: nothing derived is noise of
    the request itself. From `keys [B, 2] uint32` of requests and `lengths [B]`, int32,
    of texts as the step begins come `num` independent keys a row, `[num, B, 2] uint32`.
    """
    counter = (
        lengths.astype(jnp.uint32) | np.uint32(1 << 31),
        jnp.arange(num, dtype=jnp.uint32)[:, None],
    )
    words = threefry2x32((keys[:, 0], keys[:, 1]), counter, rounds=20)
    return jnp.stack(words, axis=-1)
