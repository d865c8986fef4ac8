"""Candidate sets against tries made of dicts."""

import itertools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specdec import candidate_twins as twins
from tlt_jax.specdec import candidates

BATCH = 2
combine = jax.jit(candidates.combine)
judge = jax.jit(candidates.judge)


def random_set(rng, size, vocab, batch=BATCH):
    """Forests of up to `size` nodes, with absent ones in between."""
    tokens, parents, depths = (np.zeros((batch, size), np.int32) for _ in range(3))
    parents -= 1
    scores = np.full((batch, size), -np.inf, np.float32)
    for row in range(batch):
        paths = {-1: ()}
        for index in range(size):
            if rng.random() < 0.2:
                continue
            parent = int(rng.choice(list(paths)))
            token = int(rng.integers(vocab))
            path = (*paths[parent], token)
            if path in paths.values():
                continue
            paths[index] = path
            tokens[row, index], parents[row, index] = token, parent
            depths[row, index] = len(path)
            above = scores[row, parent] if parent >= 0 else 0
            scores[row, index] = above - rng.exponential()
    return candidates.Candidates(tokens, parents, depths, scores)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_union_equals_that_of_tries(seed, vocab):
    rng = np.random.default_rng(seed)
    first, second = random_set(rng, 7, vocab), random_set(rng, 9, vocab)
    both = combine(first, second)
    assert both.tokens.shape == (BATCH, 16)
    for row in range(BATCH):
        ours, a, b = (twins.trie(x, row) for x in (both, first, second))
        assert list(ours) == [*a, *(path for path in b if path not in a)]
        for path, (index, score) in ours.items():
            there = [x[path] for x in (a, b) if path in x]
            assert score == max(score for _, score in there)
            assert index == (a[path][0] if path in a else 7 + b[path][0])


def test_union_takes_the_better_score_and_lends_its_parents():
    first = candidates.Candidates(
        np.array([[5, 0, 6]], np.int32),
        np.array([[-1, -1, 0]], np.int32),
        np.array([[1, 0, 2]], np.int32),
        np.array([[-2.0, -np.inf, -2.5]], np.float32),
    )
    second = candidates.Candidates(
        np.array([[5, 6, 7, 0]], np.int32),
        np.array([[-1, 0, 1, -1]], np.int32),
        np.array([[1, 2, 3, 1]], np.int32),
        np.array([[-1.0, -3.0, -3.5, -4.0]], np.float32),
    )
    united = combine(first, second)
    assert twins.trie(united, 0) == {
        (5,): (0, -1.0),
        (5, 6): (2, -2.5),
        (5, 6, 7): (5, -3.5),
        (0,): (6, -4.0),
    }
    none = jax.tree.map(lambda x: x[:, :0], first)
    for alone in (combine(none, second), combine(second, none)):
        assert twins.trie(alone, 0) == twins.trie(second, 0)


def test_rows_do_not_interact():
    rng = np.random.default_rng(3)
    first, second = random_set(rng, 7, 2), random_set(rng, 9, 2)
    both = combine(first, second)
    for row in range(BATCH):
        alone = combine(only(first, row), only(second, row))
        assert twins.trie(alone, 0) == twins.trie(both, row)


def only(found, row):
    return jax.tree.map(lambda x: x[row : row + 1], found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_judgement_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    found = random_set(rng, 12, 2)
    for drawn in itertools.product(range(2), repeat=3):
        for count in range(4):
            counts = np.array([count, 3], np.int32)
            accepted, tried = judge(
                found, np.array([drawn, drawn[::-1]], np.int32), counts
            )
            for row, came in enumerate((drawn[:count], drawn[::-1])):
                nodes = twins.trie(found, row)
                wanted = {i for path, (i, _) in nodes.items() if path in prefixes(came)}
                assert set(np.flatnonzero(accepted[row])) == wanted
                had_chance = set()
                for path, (index, _) in nodes.items():
                    before, depth = path[:-1], len(path)
                    if before not in prefixes(came) or depth > len(came):
                        continue
                    right = nodes.get(came[:depth])
                    if right is None or right[0] >= index:
                        had_chance.add(index)
                assert set(np.flatnonzero(tried[row])) == had_chance


def prefixes(text):
    return {text[:i] for i in range(len(text) + 1)}
