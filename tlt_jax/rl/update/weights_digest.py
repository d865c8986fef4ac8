"""A digest of weights: 64 bits that agree where all bits of all weights do.

Sums of integers modulo 2^32 are the same in every order, so the digest does not depend
on how the weights are split over devices, and each device reads its own part alone.

Reference: Appleby, MurmurHash3, 2011 (the finaliser that mixes a word's bits).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tlt_jax.types import Array

# Odd numbers, by which places, leaves and the two sums are told apart.
_PLACE, _LEAF, _SECOND = 0x9E3779B1, 0x85EBCA77, 0x27D4EB2F


def sums(tree: Any) -> Array:
    """Digest a tree of float32 arrays on the devices that hold it; to be compiled.

    Returns:
      `[2] uint32`: two sums over all weights' bits, mixed with their places in the
      array and the array's place in the tree.
    """
    first = second = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = lax.bitcast_convert_type(leaf, jnp.uint32)
        place = _places(leaf.shape) * jnp.uint32(_PLACE)
        mixed = _mix(words ^ (place + jnp.uint32(number * _LEAF & 0xFFFFFFFF)))
        first += jnp.sum(mixed, dtype=jnp.uint32)
        again = (mixed ^ (mixed >> 15)) * jnp.uint32(_SECOND)
        second += jnp.sum(again, dtype=jnp.uint32)
    return jnp.stack([first, second])


def text(words: np.ndarray) -> str:
    """Write what `sums` returned as 16 hexadecimal digits."""
    return "".join(f"{int(word):08x}" for word in words)


def _places(shape: tuple[int, ...]) -> Array:
    """Number the elements in row-major order, modulo 2^32."""
    places, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        steps = lax.broadcasted_iota(jnp.uint32, shape, axis)
        places = places + steps * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return places


def _mix(word: Array) -> Array:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
