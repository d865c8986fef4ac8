"""Less room and less depth: against slow forms, and against steps that had less."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import test_tree
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import rooms, strategy, verify
from tlt_jax.specdec import tree as tree_lib

ALL = len(rooms.ROOMS) - 1
BATCH, DEPTH = test_tree.BATCH, test_tree.DEPTH
# Three rows of two levels: the first guesses well, the second badly, the third ended.
CHAINS = candidates_lib.Candidates(
    tokens=np.array([[3, 4, 5], [6, 7, 8], [3, 4, 5]], np.int32),
    parents=np.array([[-1, 0, 1]] * 3, np.int32),
    depths=np.array([[1, 2, 3]] * 3, np.int32),
    scores=np.log(
        np.array([[0.9, 0.8, 0.5], [0.5, 0.25, 0.2], [1.0, 1.0, 1.0]], np.float32)
    ),
)
ALIVE = np.array([True, True, False])


def walk_of(drawn, num_accepted):
    """A walk of which the path is not looked at."""
    drawn = np.array(drawn, np.int32)
    return verify.Walk(drawn, drawn, np.array(num_accepted, np.int32))


def at(*sizes):
    return [rooms.ROOMS.index(size) for size in sizes]


def test_chains_by_hand():
    """Two rows alive, of all six nodes; 0.5 twice, of which the first row's is first.

    Verified are five; the first accepts all three, the second its first.
    """
    walk = walk_of([[3, 4, 5, 9], [6, 1, 0, 0], [3, 4, 5, 9]], [3, 1, 3])
    chain = strategy.parse("D3K1V4N7")
    found = np.asarray(rooms.accepted_by_room(CHAINS, walk, ALIVE, chain))
    assert found.shape == (4, ALL + 1) and found.dtype == np.int32
    # In order: .9, .8, .5 of the first row, .5 and .25 of the second; then there is no
    # more room. A quarter of a node for each of two rows is none, half of one is one.
    columns = at(0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, math.inf)
    assert found[0, columns].tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 5]
    # One level: .9 and .5.
    assert found[1, columns].tolist() == [0, 1, 1, 2, 2, 2, 2, 2, 2]
    # Two: .9, .8, .5, .25.
    assert found[2, columns].tolist() == [0, 1, 1, 2, 3, 3, 3, 3, 3]
    assert found[3, columns].tolist() == [0, 1, 1, 2, 3, 4, 4, 4, 4]


def test_what_was_left_out_comes_in_where_deeper_nodes_are():
    """Of two nodes the first row has both; of depth 1 each has one.

    What the target drew behind the text of the second row is known.
    """
    tight = strategy.parse("D3K1V4N4")
    for drawn, right in ((6, 2), (9, 1)):
        walk = walk_of([[3, 4, 1, 0], [drawn, 0, 0, 0], [0, 0, 0, 0]], [2, 0, 0])
        found = rooms.accepted_by_room(CHAINS, walk, ALIVE, tight)
        assert np.asarray(found)[:, ALL].tolist() == [2, right, 2, 2]
    # A chain rule draws another token where it rejects: never that one counts.
    whole = strategy.parse("D3K1V4")
    walk = walk_of([[3, 4, 1, 0], [6, 0, 0, 0], [0, 0, 0, 0]], [2, 0, 0])
    found = rooms.accepted_by_room(CHAINS, walk, ALIVE, whole)
    assert np.asarray(found)[:, ALL].tolist() == [6, 1, 2, 2]


def slow(candidates, drawn, known, alive, depth, most, room):
    """Accepted of the best nodes down to a depth, at most so many, or None: not known.

    Row r draws `drawn[r][d]` behind depth d of its path, `known[r]` of which are known.
    """
    nodes = [
        (-candidates.scores[r, i], r, i)
        for r, i in np.ndindex(candidates.scores.shape)
        if alive[r]
        and np.isfinite(candidates.scores[r, i])
        and candidates.depths[r, i] <= depth
    ]
    kept, of_row = [], [0] * len(alive)
    for _, r, i in sorted(nodes):
        if of_row[r] < most and len(kept) < room:
            of_row[r] += 1
            kept.append((r, i))
    accepted = 0
    for r in np.flatnonzero(alive):
        node = -1
        for d in range(known[r]):
            children = [
                i
                for i in range(candidates.tokens.shape[1])
                if (r, i) in kept
                and candidates.parents[r, i] == node
                and candidates.tokens[r, i] == drawn[r][d]
            ]
            if not children:
                break
            (node,), accepted = children, accepted + 1
    return len(kept), accepted


@pytest.mark.parametrize("name", ["D4K3V5N40", "D4K3V5", "D4K3V15N21", "D4K3V15"])
def test_as_the_slow_form_and_as_steps_with_less(name):
    tight = strategy.parse(name)
    most = tight.tokens_to_verify - 1
    count = jax.jit(functools.partial(rooms.accepted_by_room, strategy=tight))
    select = jax.jit(tree_lib.select, static_argnums=2)
    share = jax.jit(tree_lib.share, static_argnums=(2, 3))
    root, compared = np.zeros(BATCH, np.int32), 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        candidates = test_tree.random_candidates(seed)
        alive = rng.random(BATCH) < 0.8
        # What the target draws at each depth, whatever was accepted above.
        drawn = rng.integers(test_tree.VOCAB, size=(BATCH, DEPTH + 1), dtype=np.int32)

        def step(budget, depth, candidates=candidates, alive=alive, drawn=drawn):
            shallow = jnp.where(candidates.depths <= depth, candidates.scores, -jnp.inf)
            left = candidates.replace(scores=shallow)
            if budget < BATCH * (most + 1):
                left = share(left, alive, most + 1, budget)
            tree = select(left, root, most + 1)
            at_nodes = np.take_along_axis(drawn, np.asarray(tree.depths), axis=1)
            return verify.walk(tree, jnp.asarray(at_nodes), DEPTH + 1)

        budget = tight.num_columns(BATCH)
        walk = step(budget, DEPTH)
        found = np.asarray(count(candidates, walk, alive))
        accepted = np.asarray(walk.num_accepted)
        known = np.minimum(accepted + 1, DEPTH)
        room = budget - alive.sum()
        for depth in range(1, DEPTH + 1):
            for j, size in enumerate(rooms.ROOMS):
                has = math.floor(min(room, size * alive.sum()))
                less = candidates, drawn, known, alive, depth, most, has
                verified, wanted = slow(*less)
                assert found[depth, j] == wanted, (seed, depth, size)
                if depth == DEPTH:
                    assert found[0, j] == verified
                if j % 3 == 0 and np.isfinite(size):
                    # A step that has so much less, where all that it draws was seen.
                    again = step(has + int(alive.sum()), depth)
                    reached = np.asarray(again.num_accepted)
                    if np.all((reached <= accepted + 1)[alive]):
                        assert found[depth, j] == reached[alive].sum()
                        compared += 1
        assert found[DEPTH, ALL] == accepted[alive].sum()
    assert compared > 20


def test_one_row_of_chains_says_it_by_its_depths():
    rng = np.random.default_rng(3)
    for name in ("D5K1V6", "D5K1V6N4"):
        chain = strategy.parse(name)
        num = chain.num_columns(1) - 1
        counts, summed = np.zeros(6, int), 0
        for _ in range(20):
            scores = np.log(np.cumprod(rng.random((1, 5)), axis=1)).astype(np.float32)
            line = candidates_lib.Candidates(
                tokens=np.arange(5)[None],
                parents=np.arange(-1, 4)[None],
                depths=np.arange(1, 6)[None],
                scores=scores,
            )
            accepted = min(int(rng.integers(6)), num)
            walk = walk_of([[*range(accepted), *[9] * (6 - accepted)]], [accepted])
            summed += rooms.accepted_by_room(line, walk, np.array([True]), chain)
            counts += accepted >= np.arange(6)
        for made in (
            rooms.of_chains(counts, num),
            rooms.of_chains(jnp.array(counts), num),
        ):
            np.testing.assert_array_equal(made, summed)
    # By hand: of 8 row-steps 6, 4 and 3 came so far.
    made = rooms.of_chains(np.array([8, 6, 4, 3]), 3)
    columns = at(0.75, 1, 1.5, 2, 3, math.inf)
    assert made[:, columns].tolist() == [
        [0, 8, 8, 16, 24, 24],
        [0, 6, 6, 6, 6, 6],
        [0, 6, 6, 10, 10, 10],
        [0, 6, 6, 10, 13, 13],
    ]
