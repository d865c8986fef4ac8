"""Recursive rejection by enumeration: every tree, every outcome of tests, every token.

Gumbel noise is continuous; here children are drawn by finitely many cases. The child of
rank j of any node of depth d is that at which the distribution function of the node's
law, without the children before it, passes one number u(d, j): draws without
replacement, too, and all nodes of a depth share their chance as in a step.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests import mutation
from tests.specdec import test_chain_rules as chains
from tlt_jax.specdec import protocols, rejection, sampling, tree

VOCAB = 3
# Each node's parent, the root first; children of a node in their order.
SHAPES = {
    "chain": (0, 0, 1, 2),
    "uneven": (0, 0, 0, 1, 1, 2, 3),
    "wide": (0, 0, 0, 0, 1, 1, 1, 2),
}


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def children_of(parents, node):
    return [i for i, parent in enumerate(parents) if i and parent == node]


def depths_of(parents):
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def passed(law, u):
    """The token at which the distribution function of weights passes u."""
    below = np.cumsum(law) / np.sum(law)
    return int(np.sum(below[:-1] < u))


def cells_of(draft, depth, rank):
    """Cells of u(depth, rank) in each of which every law draws one token."""
    ends = {0.0, 1.0}
    for prefix in itertools.product(range(VOCAB), repeat=depth):
        for before in itertools.combinations(range(VOCAB), rank):
            law = draft[prefix].copy()
            law[list(before)] = 0
            if law.sum() > 0:
                ends.update(np.cumsum(law)[:-1] / law.sum())
    ends = np.sort([*ends])
    ends = ends[np.concatenate([[True], np.diff(ends) > 1e-14])]
    return list(zip((ends[1:] + ends[:-1]) / 2, np.diff(ends), strict=True))


def sampled_trees(parents, draft, shared_depth=lambda depth: depth):
    """Every tree that may be drawn: its tokens, and their probability."""
    depths = depths_of(parents)
    places = {}
    for node in range(len(parents)):
        for rank, _ in enumerate(children_of(parents, node)):
            places[shared_depth(depths[node]), rank] = None
    found = {}
    cells = [merged(draft, depths, place, shared_depth) for place in places]
    for case in itertools.product(*cells):
        chance = {place: u for place, (u, _) in zip(places, case, strict=True)}
        tokens, prefixes = [0] * len(parents), [()] * len(parents)
        for node in range(len(parents)):
            law = draft[prefixes[node]].copy()
            for rank, child in enumerate(children_of(parents, node)):
                place = shared_depth(depths[node]), rank
                tokens[child] = passed(law, chance[place])
                law[tokens[child]] = 0
                prefixes[child] = (*prefixes[node], tokens[child])
        volume = np.prod([width for _, width in case])
        key = tuple(tokens)
        found[key] = found.get(key, 0.0) + volume
    assert abs(sum(found.values()) - 1) < 1e-9
    return found


def merged(draft, depths, place, shared_depth):
    """Cells of a number for all depths that have it."""
    ends = [0.0]
    for depth in set(depths):
        if shared_depth(depth) == place[0]:
            sides = np.cumsum([w for _, w in cells_of(draft, depth, place[1])])
            ends = np.union1d(ends, sides)
    ends = ends[np.concatenate([[True], np.diff(ends) > 1e-14])]
    return list(zip((ends[1:] + ends[:-1]) / 2, np.diff(ends), strict=True))


def slow_walks(tokens, parents, target, draft):
    """Every way down a tree: `(nodes, probability, law of what follows, uniforms)`.

    Uniform numbers, one a depth, are the middle of those for which it goes so.
    """

    def go(node, prefix, nodes, probability, uniforms):
        target_probs, draft_probs = target[prefix], draft[prefix]
        low = 0.0
        for child in children_of(parents, node):
            token = tokens[child]
            ratio = target_probs[token] / draft_probs[token]
            end = low + (1 - low) * min(1.0, ratio)
            yield from go(
                child,
                (*prefix, token),
                [*nodes, child],
                probability * (end - low),
                [*uniforms, (low + end) / 2],
            )
            low = end
            if ratio >= 1:
                return
            rest = np.maximum(target_probs - draft_probs, 0)
            target_probs = rest / rest.sum()
            draft_probs = np.where(np.arange(VOCAB) == token, 0, draft_probs)
            draft_probs = draft_probs / (draft_probs.sum() or 1)
        middle = [*uniforms, (low + 1) / 2]
        yield nodes, probability * (1 - low), target_probs, middle

    return [way for way in go(0, (), [], 1.0, []) if way[1] > 1e-9]


def cases_of(parents, target, draft, trees):
    """Rows for the judge, `{name: array}`, and what the slow walk makes of each."""
    depth = max(depths_of(parents))
    rows, expected = [], []
    for tokens, volume in trees.items():
        prefixes = [()]
        for node in range(1, len(parents)):
            prefixes.append((*prefixes[parents[node]], tokens[node]))
        for nodes, probability, law, uniforms in slow_walks(
            tokens, parents, target, draft
        ):
            uniforms = (uniforms + [0.5] * depth)[:depth]
            for follow in np.flatnonzero(law > 1e-9):
                rows.append((tokens, prefixes, uniforms, follow))
                drawn = (*(tokens[node] for node in nodes), int(follow))
                weight = volume * probability * law[follow]
                expected.append((nodes, drawn, weight))
    return rows, expected


def judged(rule, parents, target, draft, rows):
    """The rule's walks of all rows as one batch, and log-probabilities."""
    num, width = len(rows), len(parents)
    inner = sorted(set(parents[1:]))
    leaf = np.full(VOCAB, np.nan)

    def each(values, dtype=np.int32):
        return np.tile(np.array(values, dtype), (num, 1))

    with np.errstate(divide="ignore"):
        scores = np.log([[target[p] for p in prefixes] for _, prefixes, *_ in rows])
    # A constant more, as before a law is normalised.
    law = sampling.Law(scores + 1.5, np.full((num, width), 1.5))
    # The root's law, then those of other nodes with children from the last on.
    slots = [0, *inner[:0:-1]]
    probs = [[draft[row[1][node]] for node in slots] + [leaf] for row in rows]
    behind = [slots.index(i) if i in slots else 0 for i in range(1, width)]
    line = tree.DraftTree(
        tokens=np.array([row[0] for row in rows], np.int32),
        parents=each(parents),
        depths=each(depths_of(parents)),
        valid=each([True] * width, bool),
        chances=each([1.0] * width, np.float32),
        sources=each(range(-1, width - 1)),
    )
    laws = protocols.Laws(np.array(probs), each(behind), None)
    chance = rejection.Chance(
        draft=None,
        uniforms=np.array([row[2] for row in rows]),
        follow=1e3 * np.eye(VOCAB)[[row[3] for row in rows]],
    )
    judge = jax.jit(rule.judge, static_argnums=4)
    return jax.device_get(
        judge(law, line, protocols.Proposal(None, laws), chance, None)
    )


def variation(found, target, length):
    """Total variation between texts that are filled up by plain decoding, and it."""
    law = dict.fromkeys(itertools.product(range(VOCAB), repeat=length), 0.0)
    for drawn, weight in found:
        for rest in itertools.product(range(VOCAB), repeat=length - len(drawn)):
            text = (*drawn, *rest)
            steps = range(len(drawn), length)
            law[text] += weight * np.prod([target[text[:i]][text[i]] for i in steps])
    return chains.variation(law, target)


@functools.cache
def sampled(shape, seed, zeros=False):
    """Parents, the target's and the drafter's laws, and every tree."""
    laws = [chains.prefix_laws(which, zeros) for which in (seed, seed + 100)]
    return SHAPES[shape], *laws, sampled_trees(SHAPES[shape], laws[1])


@pytest.mark.parametrize(
    "shape,seed,zeros",
    [
        ("chain", 0, False),
        ("uneven", 1, False),
        ("uneven", 2, True),
        ("wide", 3, False),
    ],
)
def test_output_law_is_the_targets(shape, seed, zeros):
    """And every walk is that of the slow twin."""
    parents, target, draft, trees = sampled(shape, seed, zeros)
    rows, expected = cases_of(parents, target, draft, trees)
    walk, logprobs = judged(rejection.Rejection(), parents, target, draft, rows)
    found = []
    for row, (nodes, drawn, weight) in enumerate(expected):
        num = len(nodes)
        assert walk.num_accepted[row] == num
        assert walk.path[row, : num + 1].tolist() == [0, *nodes]
        assert set(walk.path[row, num:].tolist()) == {walk.path[row, num]}
        assert tuple(walk.tokens[row, : num + 1].tolist()) == drawn
        laws = [target[drawn[:i]][drawn[i]] for i in range(num + 1)]
        np.testing.assert_allclose(logprobs[row, : num + 1], np.log(laws), atol=1e-12)
        found.append((tuple(walk.tokens[row, : num + 1].tolist()), weight))
    assert abs(sum(weight for _, weight in found) - 1) < 1e-6
    assert variation(found, target, chains.DEPTH + 1) < 1e-6


def behind(laws, base):
    return {p[len(base) :]: law for p, law in laws.items() if p[: len(base)] == base}


def test_texts_of_several_steps_are_the_targets():
    """Steps of two depths, whose rows stand behind different texts; calls end early."""
    target, draft = chains.prefix_laws(5), chains.prefix_laws(105)
    # Behind up to one token trees of two levels, behind two a level.
    parents_of = {0: (0, 0, 0, 1), 1: (0, 0, 0, 1), 2: (0, 0, 0)}
    steps = {}
    for parents in dict.fromkeys(parents_of.values()):
        rows, told = [], []
        for length in (n for n, its in parents_of.items() if its == parents):
            for base in itertools.product(range(VOCAB), repeat=length):
                laws = behind(target, base), behind(draft, base)
                trees = sampled_trees(parents, laws[1])
                cases, expected = cases_of(parents, *laws, trees)
                for tokens, prefixes, *chance in cases:
                    rows.append((tokens, [(*base, *p) for p in prefixes], *chance))
                told += [(base, weight) for *_, weight in expected]
        walk, _ = judged(rejection.Rejection(), parents, target, draft, rows)
        for row, (base, weight) in enumerate(told):
            # No more than two, or what the text has room for.
            num = min(walk.num_accepted[row] + 1, 2, 3 - len(base))
            text = (*base, *walk.tokens[row, :num].tolist())
            steps.setdefault(base, []).append((text, weight))
    law = {(): 1.0}
    for length in range(3):
        for base in [text for text in law if len(text) == length]:
            weight = law.pop(base)
            for text, chance in steps[base]:
                law[text] = law.get(text, 0.0) + weight * chance
    assert len(law) == 27
    assert variation(law.items(), target, 3) < 1e-6


def test_what_the_shape_and_chance_may_not_depend_on():
    """Drawn tokens, and chance of other depths."""
    parents, target, draft, trees = sampled("uneven", 1)

    def distance(trees, shape=lambda tokens: parents):
        found = []
        for tokens, volume in trees.items():
            ways = slow_walks(tokens, shape(tokens), target, draft)
            for nodes, probability, law, _ in ways:
                drawn = tuple(tokens[node] for node in nodes)
                for token in range(VOCAB):
                    weight = volume * probability * law[token]
                    found.append(((*drawn, token), weight))
        return variation(found, target, chains.DEPTH + 1)

    assert distance(trees) < 1e-12
    one_number = sampled_trees(parents, draft, lambda depth: 0)
    assert distance(one_number) > 0.01

    def without_unlikely_ones(tokens):
        # The root's second child, and all behind it.
        is_likely = draft[()][tokens[2]] > 0.1
        return parents if is_likely else (0, 0, -1, *parents[3:])

    assert distance(trees, without_unlikely_ones) > 0.01


MUTATIONS = {
    "children tested from the last on": (
        "jnp.cumsum(is_child, axis=1) ==",
        "jnp.cumsum(is_child[:, ::-1], axis=1)[:, ::-1] ==",
    ),
    "residual not renormalised": (
        "return normalised(rest, target_probs)[0]",
        "return rest",
    ),
    "rejected and drawn from the target's law": (
        "rest = jnp.maximum(target_probs - draft_probs, 0.0)",
        "rest = target_probs",
    ),
    "a child's law with those before it": (
        "rest = jnp.where(here, 0.0, draft_probs)",
        "rest = draft_probs",
    ),
    "a child's law without those before it, not renormalised": (
        "return normalised(rest, rest)[0]",
        "return rest",
    ),
    "the root's law at every node": (
        "proposal.laws.behind[row_B, source_B])",
        "0)",
    ),
    "tests of the root's number": (
        "chance.uniforms[row_B, deeper_B]",
        "chance.uniforms[row_B, 0 * deeper_B]",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_error_shows(name):
    parents, target, draft, trees = sampled("uneven", 1)
    rows, expected = cases_of(parents, target, draft, trees)
    rule = mutation.mutate(rejection, *MUTATIONS[name]).Rejection()
    walk, _ = judged(rule, parents, target, draft, rows)
    found = []
    for row, (_, _, weight) in enumerate(expected):
        num = walk.num_accepted[row]
        found.append((tuple(walk.tokens[row, : num + 1].tolist()), weight))
    assert variation(found, target, chains.DEPTH + 1) > 0.01


def test_a_number_that_failed_is_uniform_again():
    uniform = np.linspace(0.3, 1, 701)[:-1]
    again = rejection.after_failure(uniform, np.full(700, 0.3))
    np.testing.assert_allclose(again, np.linspace(0, 1, 701)[:-1], atol=1e-12)
    # Of one that could not fail nothing is asked.
    assert np.isfinite(rejection.after_failure(np.float64(0.2), np.float64(1.0)))
