"""The n-gram proposer against lists and loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.specdec import candidate_twins as twins
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec.proposers import ngram

TABLE = np.array([0.0, 0.2, 0.37, 0.55, 0.71], np.float32)
TEXTS, WIDTH, BATCH, SOURCES = 5, 14, 2, 4

propose = jax.jit(ngram.propose, static_argnames=("draft_depth", "num_chains"))


def corpus_of(texts, num_texts=TEXTS, width=WIDTH):
    rows = np.full((num_texts, width), -1, np.int32)
    lengths = np.zeros((num_texts,), np.int32)
    for row, text in enumerate(texts):
        rows[row, : len(text)] = text
        lengths[row] = len(text)
    return ngram.Corpus(rows, lengths)


def chains_twin(texts, own, sources, longest, depth, num_chains):
    """Chosen continuations `(match length, tokens)`, place by place as documented."""
    row = texts[own]
    places = []
    for order, source in enumerate(sources):
        if source < 0:
            continue
        text = texts[source]
        for place in range(1, len(text)):
            match = 0
            while (
                match < min(longest, place, len(row))
                and text[place - 1 - match] == row[-1 - match]
            ):
                match += 1
            if match:
                onward = tuple(text[place : place + depth])
                places.append((match, -order, len(onward), place, onward))
    chosen = []
    for match, *_, onward in sorted(places, reverse=True):
        if len(chosen) == num_chains:
            break
        if any(kept[: len(onward)] == onward for _, kept in chosen):
            continue
        chosen.append((match, onward))
    return chosen


def proposal_twin(chosen, table):
    """Trie `{path: (score, match length)}`; children in the order of their chains."""
    longest = len(table) - 1
    nodes = {}
    for match, onward in chosen:
        for level in range(len(onward)):
            path = onward[: level + 1]
            if path in nodes:
                continue
            k = min(match + level, longest)
            score = math.log(table[k])
            for other, (_, other_k) in nodes.items():
                if len(other) == len(path) and other[:-1] == path[:-1]:
                    score += math.log(1 - table[other_k])
            nodes[path] = (score + nodes[path[:-1]][0] if level else score, k)
    return nodes


def check(texts, sources, depth, num_chains, table=TABLE):
    found, matches = propose(
        corpus_of(texts),
        np.array(sources, np.int32),
        table,
        draft_depth=depth,
        num_chains=num_chains,
    )
    assert found.tokens.shape == matches.shape == (len(sources), depth * num_chains)
    texts = [*texts, *[[]] * (TEXTS - len(texts))]
    for row, allowed in enumerate(sources):
        longest = len(table) - 1
        chosen = chains_twin(texts, row, allowed, longest, depth, num_chains)
        expected = proposal_twin(chosen, table)
        nodes = twins.trie(found, row)
        assert list(nodes) == list(expected)
        for path, (score, match) in expected.items():
            index, ours = nodes[path]
            assert ours == pytest.approx(score, abs=1e-5)
            assert matches[row, index] == match
        assert (matches[row] == 0).sum() == depth * num_chains - len(expected)
    return found


texts_of = st.integers(2, 4).flatmap(
    lambda vocab: st.lists(
        st.lists(st.integers(0, vocab - 1), max_size=WIDTH),
        min_size=BATCH,
        max_size=TEXTS,
    )
)
some_sources = st.lists(
    st.lists(st.integers(-1, TEXTS - 1), min_size=SOURCES, max_size=SOURCES),
    min_size=BATCH,
    max_size=BATCH,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts_of, some_sources, st.sampled_from([(3, 3), (1, 4), (4, 1)]))
def test_proposals_equal_those_of_lists_and_loops(texts, sources, shape):
    check(texts, sources, *shape)


def test_a_worked_example():
    # After "1 2": once 3 then 4, once 3 then 5; after "2" alone in a sibling: 6.
    own = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2]
    found = check([own, [7, 2, 6, 6]], [[0, 1, -1, -1], [1, -1, -1, -1]], 2, 3)
    assert list(twins.trie(found, 0)) == [(3,), (3, 5), (3, 4), (6,), (6, 6)]
    # The row's own end is no match of itself.
    assert twins.trie(found, 1) == {(6,): pytest.approx((0, math.log(0.2)))}


def test_longer_matches_then_earlier_sources_then_longer_rests_then_later_places():
    def first(texts, sources, depth=2):
        return list(twins.trie(check(texts, sources, depth, 1), 0))[-1]

    rest = [-1] * SOURCES
    own = [5, 2, 0, 0, 1, 2]
    assert first([own, [1, 2, 3, 3]], [[0, 1, -1, -1], rest]) == (3, 3)
    assert first([own, [5, 2, 3, 3]], [[0, 1, -1, -1], rest]) == (0, 0)
    assert first([own, [5, 2, 3, 3]], [[1, 0, -1, -1], rest]) == (3, 3)
    assert first([[2, 3, 3, 2, 0, 2], []], [[0, -1, -1, -1], rest], 3) == (3, 3, 2)
    assert first([[2, 3, 3, 2, 0, 2], []], [[0, -1, -1, -1], rest], 2) == (0, 2)


def test_rows_without_anything_to_go_by_propose_nothing():
    nothing = [-1] * SOURCES
    for texts, sources in [
        ([[], []], [[0, 1, 2, 3], [1, 0, -1, -1]]),
        ([[], [1, 2, 3]], [[1, 0, -1, -1], nothing]),
        ([[1], [1]], [[0, 1, -1, -1], [1, 0, -1, -1]]),
        ([[1, 2, 3], [4, 5, 6]], [[0, 1, -1, -1], [1, 0, -1, -1]]),
    ]:
        found = check(texts, sources, 3, 2)
        assert not np.asarray(found.present()).any()
        assert (np.asarray(found.tokens) == 0).all()
        assert (np.asarray(found.parents) == -1).all()
        assert (np.asarray(found.depths) == 0).all()


def test_rows_do_not_interact():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 3, (4, WIDTH)).tolist()
    mine, other = [0, 2, 3, -1], [1, 3, -1, -1]
    found = check(texts, [mine, other], 3, 3)
    changed = check([texts[0], texts[1][:5], *texts[2:]], [mine, [-1] * 4], 3, 3)
    assert twins.trie(found, 0) == twins.trie(changed, 0)


@pytest.mark.parametrize("certain", [0.0, 1.0])
def test_extreme_acceptances_leave_candidates_present(certain):
    table = np.full(5, certain, np.float32)
    texts = [[1, 2, 1, 3, 1, 0, 1], []]
    found, _ = propose(
        corpus_of(texts),
        np.array([[0, -1, -1, -1], [-1] * 4], np.int32),
        table,
        draft_depth=3,
        num_chains=3,
    )
    scores = [score for _, score in twins.trie(found, 0).values()]
    assert len(scores) == 8 and np.isfinite(scores).all()


def test_texts_grow_by_what_was_drawn():
    texts = [[1, 2], list(range(WIDTH - 1)), [7]]
    drawn = np.array([[3, 4, 5], [6, 7, 8]], np.int32)
    grown = jax.jit(ngram.extend)(corpus_of(texts), drawn, np.array([2, 3], np.int32))
    expected = corpus_of([[1, 2, 3, 4], [*range(WIDTH - 1), 6], [7]])
    np.testing.assert_array_equal(grown.texts, expected.texts)
    np.testing.assert_array_equal(grown.lengths, expected.lengths)
    same = jax.jit(ngram.extend)(corpus_of(texts), drawn, np.zeros(2, np.int32))
    np.testing.assert_array_equal(same.texts, corpus_of(texts).texts)


def test_a_loop_that_takes_every_guess_continues_the_period():
    """Propose and extend inside a while_loop; no shape changes, one trace."""
    traces = []

    @jax.jit
    def run(corpus, sources, steps):
        traces.append(steps)

        def step(state):
            corpus, i = state
            found, _ = ngram.propose(
                corpus, sources, jnp.asarray(TABLE), draft_depth=2, num_chains=1
            )
            counts = jnp.sum(found.present(), axis=1)
            return ngram.extend(corpus, found.tokens, counts), i + 1

        return jax.lax.while_loop(lambda s: s[1] < steps, step, (corpus, 0))[0]

    sources = np.array([[0, -1], [1, -1]], np.int32)
    corpus = corpus_of([[1, 2, 3, 1, 2, 3, 1], [4, 4, 4]], num_texts=3)
    for steps in (1, 3):
        grown = run(corpus, sources, steps)
        period = ([1, 2, 3] * 5)[: 7 + 2 * steps]
        assert np.asarray(grown.texts[0, : len(period)]).tolist() == period
        assert grown.lengths[0] == len(period)
    assert len(traces) == 1


def test_no_retrace_over_other_texts():
    fn = functools.partial(ngram.propose, draft_depth=2, num_chains=2)
    traced = jax.jit(lambda *args: (traces.append(0), fn(*args))[1])
    traces = []
    for texts in ([[1, 1]], [[], [2, 3]], [[1] * WIDTH] * TEXTS):
        for sources in ([[0, 1], [1, -1]], [[-1, -1], [4, 3]]):
            traced(corpus_of(texts), np.array(sources, np.int32), TABLE)
    assert len(traces) == 1


def test_more_places_than_can_be_ranked_are_refused():
    corpus = jax.ShapeDtypeStruct((1, 2**20), jnp.int32)
    corpus = ngram.Corpus(corpus, jax.ShapeDtypeStruct((1,), jnp.int32))
    sources = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    fn = functools.partial(ngram.propose, draft_depth=8, num_chains=1)
    with pytest.raises(ValueError, match="64 sources of 1048576 tokens"):
        jax.eval_shape(fn, corpus, sources, jax.ShapeDtypeStruct((9,), jnp.float32))


def test_acceptance_is_counted_by_match_length():
    matches = np.array([[2, 3, 0, 3], [1, 3, 3, 0]], np.int32)
    tried = np.array([[1, 1, 0, 1], [0, 1, 1, 0]], bool)
    accepted = np.array([[1, 0, 0, 1], [0, 0, 1, 0]], bool)
    outcomes = ngram.update_acceptance(jnp.zeros((4, 2)), matches, accepted, tried)
    np.testing.assert_array_equal(outcomes, [[0, 0], [0, 0], [1, 1], [4, 2]])
    outcomes = ngram.update_acceptance(outcomes, matches, accepted, tried)
    np.testing.assert_array_equal(outcomes, [[0, 0], [0, 0], [2, 2], [8, 4]])
    table = ngram.acceptance_of(outcomes)
    expected = [0, 0.2, (2 + 8 / 3) / 10, (4 + 8 * 3 / 7) / 16]
    np.testing.assert_allclose(table, expected, rtol=1e-6)


def test_acceptance_learned_from_a_text_is_its_frequency():
    """Row by row over a noisy period, judged by what really came next."""
    rng = np.random.default_rng(1)
    text = np.tile([0, 1, 2, 3], 100)
    wrong = rng.random(400) < 0.15
    text = np.where(wrong, rng.integers(0, 4, 400), text).astype(np.int32)
    sources = np.zeros((1, 1), np.int32)
    table = ngram.acceptance_of(jnp.zeros((5, 2)))

    @jax.jit
    def observe(corpus, following, outcomes):
        found, matches = ngram.propose(
            corpus, sources, table, draft_depth=2, num_chains=2
        )
        accepted, tried = candidates_lib.judge(found, following, np.array([2]))
        return ngram.update_acceptance(outcomes, matches, accepted, tried)

    outcomes, twin = jnp.zeros((5, 2)), np.zeros((5, 2))
    for end in range(150, 250):
        corpus = corpus_of([text[:end]], 1, 256)
        following = text[end : end + 2]
        outcomes = observe(corpus, following[None], outcomes)
        chosen = chains_twin([text[:end].tolist()], 0, [0], 4, 2, 2)
        settled = set()
        for path, (_, match) in proposal_twin(chosen, np.asarray(table)).items():
            before = tuple(following[: len(path) - 1].tolist())
            if path[:-1] == before and before not in settled:
                twin[match, 0] += 1
                if path[-1] == following[len(path) - 1]:
                    twin[match, 1] += 1
                    settled.add(before)
    np.testing.assert_array_equal(outcomes, twin)
    assert twin[4, 0] > 50 and twin[4, 1] / twin[4, 0] > 0.6
