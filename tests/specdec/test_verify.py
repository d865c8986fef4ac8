"""The walk down a draft tree by hand; `test_tree` has a slow form beside it."""

import jax.numpy as jnp
import numpy as np

from tests.specdec import hosts
from tlt_jax.specdec import decode, noise, sampling, verify
from tlt_jax.specdec import tree as tree_lib

# The root with children 1 and 2; below 1 are 3 and 4, below 4 is 5; node 6 is padding,
# and says what the target draws.
TREE = {
    "tokens": [7, 3, 5, 2, 9, 4, 8],
    "parents": [0, 0, 0, 1, 1, 4, 0],
    "depths": [0, 1, 1, 2, 2, 3, 0],
    "valid": [True] * 6 + [False],
    "chances": [1, 0.6, 0.25, 0.75, 0.2, 1.0, 1],
    "sources": [-1, 0, 1, 2, 3, 4, -1],
}
# Drawn at nodes 0 to 6: the first goes on by 1, 4 and 5 to a bonus token; the second
# recovers at once, by what padding holds; the third is corrected behind node 1.
DRAWN = [[3, 9, 0, 0, 4, 6, 0], [8, 9, 0, 0, 4, 6, 0], [3, 1, 0, 0, 4, 6, 0]]


def trees(batch):
    kinds = dict.fromkeys(TREE, np.int32) | {"valid": bool, "chances": np.float32}
    return tree_lib.DraftTree(
        **{
            name: jnp.asarray(np.tile(np.asarray(TREE[name], kind), (batch, 1)))
            for name, kind in kinds.items()
        }
    )


def test_rows_go_as_far_as_the_draws_and_stay_there():
    walk = verify.walk(trees(3), jnp.asarray(DRAWN, jnp.int32), 4)
    assert walk.num_accepted.tolist() == [3, 0, 1]
    assert walk.path.tolist() == [[0, 1, 4, 5], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert walk.tokens.tolist() == [[3, 9, 4, 6], [8, 8, 8, 8], [3, 1, 1, 1]]
    assert walk.num_accepted.dtype == jnp.int32
    # Without drafts it is plain decoding.
    walk = verify.walk(trees(1), jnp.asarray(DRAWN[:1], jnp.int32), 1)
    assert (walk.tokens.tolist(), walk.path.tolist()) == ([[3]], [[0]])


def test_noise_is_that_of_the_positions_behind_the_text(monkeypatch):
    asked = []

    def gumbel(keys, positions, vocab_size, kernels):
        asked.append((keys.tolist(), positions.tolist(), vocab_size, kernels))
        return jnp.arange(6.0)[:, None] + jnp.zeros((6, vocab_size))

    monkeypatch.setattr(noise, "gumbel", gumbel)
    settings = decode.Settings(hosts.CFG)
    keys = jnp.array([[1, 2], [3, 4]], jnp.uint32)
    chance = verify.Keyed().chance(keys, jnp.array([4, 9]), 3, settings)
    assert asked == [
        (
            [[1, 2], [1, 2], [1, 2], [3, 4], [3, 4], [3, 4]],
            [5, 6, 7, 10, 11, 12],
            hosts.CFG.vocab_size,
            settings.kernels,
        )
    ]
    assert chance.draft[..., -1].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_nothing_is_drawn_at_temperature_0():
    settings = decode.Settings(
        hosts.CFG, sampling_cfg=sampling.SamplingConfig(temperature=0)
    )
    keys = jnp.zeros((2, 2), jnp.uint32)
    chance = verify.Keyed().chance(keys, jnp.array([4, 9]), 3, settings)
    assert chance.draft.shape == (2, 3, 1) and not chance.draft.any()


def test_drafts_are_counted_by_the_chance_that_they_were_given():
    walk = verify.walk(trees(3), jnp.asarray(DRAWN, jnp.int32), 4)
    tried, chance, true = verify.reliability(trees(3), walk, jnp.array([1, 1, 1], bool))
    # The first row tries all five, the second 1 and 2, the third 1 to 4.
    assert tried.tolist() == [0, 0, 5, 0, 0, 0, 3, 2, 0, 1]
    np.testing.assert_allclose(chance[jnp.array([2, 6, 7, 9])], [1.15, 1.8, 1.5, 1.0])
    assert true.tolist() == [0, 0, 1, 0, 0, 0, 2, 0, 0, 1]
    # Rows that have ended tell nothing.
    ended = verify.reliability(trees(3), walk, jnp.array([0, 1, 0], bool))
    assert ended[0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert not ended[2].any()
