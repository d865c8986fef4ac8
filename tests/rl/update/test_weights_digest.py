"""The digest of weights: against a NumPy twin, and what it must tell apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tlt_jax.rl.update import weights_digest

digest = jax.jit(weights_digest.sums)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4, 6), "b": (8, 6), "c": (6,), "d": (8, 6), "e": ()}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def text(values):
    return weights_digest.text(np.asarray(digest(values)))


def mix(word):
    word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ word >> 16


def twin(values):
    """In Python's integers, one weight after the other."""
    first = second = 0
    for number, leaf in enumerate(jax.tree.leaves(values)):
        for place, word in enumerate(np.ravel(leaf).view(np.uint32).tolist()):
            where = place * 0x9E3779B1 + number * 0x85EBCA77 & 0xFFFFFFFF
            mixed = mix(word ^ where)
            first += mixed
            second += (mixed ^ mixed >> 15) * 0x27D4EB2F
    return f"{first & 0xFFFFFFFF:08x}{second & 0xFFFFFFFF:08x}"


def test_it_is_that_of_a_twin():
    assert text(tree()) == twin(tree())
    assert text(tree(1)) == twin(tree(1)) != text(tree())


def test_the_last_bit_of_one_weight_is_seen():
    expected = text(tree())
    for name in "abcde":
        changed = tree()
        flat = changed[name].reshape(-1)
        flat[-1] = np.nextafter(flat[-1], np.float32(9))
        assert text(changed) != expected, name
    negated = tree()
    negated["c"][0], kept = 0.0, tree()
    kept["c"][0] = -0.0
    assert text(negated) != text(kept)


def test_places_and_arrays_are_told_apart():
    swapped = tree()
    swapped["b"][[0, 1]] = swapped["b"][[1, 0]]
    assert text(swapped) != text(tree())
    exchanged = tree()
    exchanged["b"], exchanged["d"] = exchanged["d"], exchanged["b"]
    assert text(exchanged) != text(tree())


@pytest.mark.parametrize("spec", [("x",), (None, "x")])
def test_it_is_the_same_however_weights_are_split(spec):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    values, expected = tree(), text(tree())
    for name in "bd":
        where = NamedSharding(mesh, PartitionSpec(*spec))
        values[name] = jax.device_put(jnp.asarray(values[name]), where)
    for name in "ace":
        everywhere = NamedSharding(mesh, PartitionSpec())
        values[name] = jax.device_put(jnp.asarray(values[name]), everywhere)
    assert text(values) == expected
