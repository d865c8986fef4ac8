"""Checksums of arrays: literals, single bits, and arrays that are split."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tlt_jax.runtime import sharding
from tlt_jax.workdir import checksums

TREE = {
    "w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "n": np.int32(7),
    "half": np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
    "flags": np.array([True, False]),
}
CRC = {
    "['flags']": "crc32:58c223be",
    "['half']": "crc32:525a5312",
    "['n']": "crc32:bc93e7a5",
    "['w']": "crc32:6edc4182",
}
WORDS = dict.fromkeys(CRC, "words64:")


def test_sums_are_what_they_were():
    """Checkpoints of other days are compared with these."""
    assert checksums.of(TREE) == CRC
    assert checksums.of(jax.tree.map(jnp.asarray, TREE)) == CRC
    assert checksums.of(TREE, WORDS) == {
        "['flags']": "words64:634b2ba2a2c48404",
        "['half']": "words64:d89904d00d307af8",
        "['n']": "words64:18c9aec4d7551df9",
        "['w']": "words64:3cccf0739c6ce593",
    }


@pytest.mark.parametrize("kinds", [CRC, WORDS], ids=["bytes", "words"])
def test_every_bit_counts(kinds):
    whole = checksums.of(TREE, kinds)
    for name, array in TREE.items():
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for place in {0, bits.size // 2, bits.size - 1}:
            flipped = bits.copy()
            # Of a flag the lowest bit alone is one.
            flipped[place] ^= 1
            changed = flipped.view(array.dtype).reshape(np.shape(array))
            found = checksums.of(TREE | {name: changed}, kinds)
            assert found.pop(f"['{name}']") != whole[f"['{name}']"], (name, place)
            assert found.items() <= whole.items()


def test_split_arrays_have_the_sums_of_whole_ones():
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {"w": np.random.default_rng(0).normal(size=(8, 4, 2)).astype(np.float32)}
    where = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*mesh.axis_names)
    )
    split = jax.device_put(tree, where)
    for kinds in (None, {"['w']": "words64:"}):
        assert checksums.of(split, kinds) == checksums.of(tree, kinds)


def test_places_and_order_count():
    one = checksums.of({"w": TREE["w"]}, {"['w']": "words64:"})
    other = checksums.of({"w": TREE["w"][:, ::-1]}, {"['w']": "words64:"})
    assert one != other
    assert checksums.of({"w": TREE["w"]}) != checksums.of({"w": TREE["w"][:, ::-1]})
