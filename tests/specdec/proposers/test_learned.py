"""Drafting against a slow form that computes every path anew, without caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import hosts
from tlt_jax.models import kv_cache
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import decode, sampling
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import expansion, learned

NUM, MOST, PAGE = 2, 16, 4  # rows, longest text, page size
CFG = drafter.of_target(hosts.CFG, feature_layers=(0, 1), draft_vocab_size=30)
STRATEGY = strategy_lib.Strategy(3, 2, 8)
LENGTHS = (7, 3)  # cached positions of the target
# A budget, and how many nodes of each row are expanded under it, the root among them.
BUDGETS = [(4, [2, 1]), (5, [3, 2]), (15, [5, 5])]
COUNTS = (3, 1)  # of which the drafter has still to take in


@functools.cache
def weights():
    ids = np.sort(np.random.default_rng(0).permutation(hosts.CFG.vocab_size)[:30])
    params = drafter.init(CFG, jax.random.key(2))
    params = params.replace(draft_ids=jnp.asarray(ids, jnp.int32))
    target = hosts.weights()
    return learned.DrafterWeights(
        params, target.embed, drafter_head.head_rows(target, params.draft_ids)
    )


@jax.jit
def whole(tokens, features):
    """Outputs `[D, T]` over one text: its tokens, and fused features."""
    out = drafter.forward(
        weights().params,
        CFG,
        weights().embedded(tokens[None], jnp.float32),
        features[:, None],
        jnp.arange(MOST)[None],
    )
    logits = drafter_head.logits(weights().params, CFG, weights().head, out.hidden)
    return out.hidden[:, 0], logits[0]


def texts_and_features():
    rng = np.random.default_rng(1)
    tokens = rng.integers(hosts.CFG.vocab_size, size=(NUM, MOST)).astype(np.int32)
    shape = (CFG.num_features * hosts.CFG.d_model, NUM, MOST)
    return tokens, rng.normal(size=shape).astype(np.float32)


def slow_draft(row, noise, tau, sharpness, temperature, laws=None):
    """Children of each expanded path: `{path: [(token, score), ...]}`.

    Where `laws` take up the laws behind paths, scores are by rank.
    """
    tokens, raw = texts_and_features()
    fused = np.array(drafter.fuse(weights().params, CFG, raw))[:, row]
    ids = np.asarray(weights().params.draft_ids)
    length = LENGTHS[row]
    found = {}

    def children(path):
        text, features = np.roll(tokens[row], -1), fused.copy()
        for i, token in enumerate(path):
            hidden, _ = whole(text, features)
            # The next input: the path's token, and what was put out before it.
            text[length + i] = token
            features[:, length + i] = np.asarray(hidden)[:, length + i - 1]
        _, logits = whole(text, features)
        scores = np.asarray(logits)[length - 1 + len(path)].astype(np.float64)
        scores = scores / (temperature or 1)
        if laws is not None:
            laws[path] = np.exp(scores) / np.exp(scores).sum()
        if noise is not None:
            chance = np.asarray(noise)[row, len(path)][ids]
            scores = (scores * sharpness + chance) / tau
        scores = scores - np.log(np.sum(np.exp(scores - scores.max()))) - scores.max()
        best = np.argsort(-scores)[: STRATEGY.topk]
        if laws is not None:
            return [(int(ids[i]), -0.25 - 1.75 * rank) for rank, i in enumerate(best)]
        return [(int(ids[i]), scores[i]) for i in best]

    live = [((), 0.0)]
    for _ in range(STRATEGY.draft_depth):
        level = []
        for path, score in live:
            found[path] = children(path)
            level += [((*path, t), score + gain) for t, gain in found[path]]
        live = sorted(level, key=lambda one: -one[1])[: STRATEGY.topk]
    return found


@functools.cache
def draft_program(coupled, temperature, strategy):
    settings = decode.Settings(hosts.CFG, sampling.SamplingConfig(temperature))
    ranking = {True: "coupled", False: "deterministic"}.get(coupled, coupled)
    proposer = learned.Learned(strategy, settings, CFG, ranking)

    def fn(weights, cache, table, accepted, noise, tau, sharpness):
        nothing = jnp.zeros((NUM,), jnp.int32)
        rows = decode.Rows(table, *[nothing] * 3, remaining=nothing + 1)
        draft = learned.Draft(weights, tau, sharpness, nothing, accepted["tokens"])
        state = learned.State(cache, **accepted)
        return proposer.propose(draft, state, rows, noise)

    return jax.jit(fn)


def proposed(coupled, temperature, sharpness, strategy=STRATEGY):
    """A proposal for both rows, and the noise that it was made with."""
    tokens, raw = texts_and_features()
    num_pages = 1 + NUM * MOST // PAGE
    table = 1 + np.arange(num_pages - 1, dtype=np.int32).reshape(NUM, -1)
    target = kv_cache.create(hosts.CFG, num_pages, PAGE, jnp.float32, raw.shape[0])
    target = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), target)
    written = jax.jit(kv_cache.append_pages)(
        target,
        jnp.zeros((2, 2, 6, NUM, MOST)),
        jnp.zeros((2, 2, 6, NUM, MOST)),
        table,
        np.zeros(NUM, np.int32),
        np.full(NUM, MOST, np.int32),
        features=raw,
    )
    cache = kv_cache.create(CFG.layer, num_pages, PAGE, jnp.float32)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    lengths, counts = np.array(LENGTHS, np.int32), np.array(COUNTS, np.int32)
    start = lengths - counts
    cache = jax.jit(functools.partial(learned.fill, cfg=CFG))(
        weights(),
        written,
        cache,
        np.roll(tokens, -1, axis=1)[:, : 2 * PAGE],
        start,
        table,
        np.zeros(NUM, np.int32),
    )
    width = STRATEGY.max_accept_length
    at = start[:, None] + np.arange(width)
    features = np.take_along_axis(raw, at[None], axis=2)
    features = np.where(np.arange(width) < counts[:, None], features, 0)
    accepted = dict(
        tokens=np.take_along_axis(tokens, at + 1, axis=1),
        features=features,
        start=start,
        counts=counts,
    )
    noise = jax.random.gumbel(jax.random.key(3), (NUM, 4, hosts.CFG.vocab_size))
    made = draft_program(coupled, temperature, strategy)(
        weights(),
        cache,
        table,
        accepted,
        noise,
        jnp.float32(0.6),
        jnp.float32(sharpness),
    )
    return made, noise


def children_of(found, row):
    """Children of each path among a row's candidates: `{path: [(token, gain), ..]}`."""
    paths, children = {-1: ((), 0.0)}, {}
    for i in np.flatnonzero(found.scores[row] > -np.inf):
        path, score = paths[int(found.parents[row, i])]
        token = int(found.tokens[row, i])
        assert found.depths[row, i] == len(path) + 1
        gain = float(found.scores[row, i]) - score
        children.setdefault(path, []).append((token, gain))
        paths[int(i)] = ((*path, token), float(found.scores[row, i]))
    return children


@pytest.mark.parametrize(
    "coupled,temperature,sharpness",
    [(True, 1.0, 1.0), (True, 0.7, 1.5), (False, 1.0, 1.5)],
)
def test_drafts_are_those_of_whole_paths(coupled, temperature, sharpness):
    made, noise = proposed(coupled, temperature, sharpness)
    found = jax.device_get(made.candidates)
    keys, values, _ = made.extra
    width = STRATEGY.max_accept_length
    assert keys.shape == values.shape == (2, 6, NUM, width)
    for row in range(NUM):
        chance = noise if coupled else None
        wanted = slow_draft(row, chance, 0.6, sharpness, temperature)
        children = children_of(found, row)
        assert children.keys() == wanted.keys()
        for path, pairs in wanted.items():
            assert [t for t, _ in children[path]] == [t for t, _ in pairs]
            np.testing.assert_allclose(
                [s for _, s in children[path]], [s for _, s in pairs], atol=2e-5
            )


def test_a_sampled_trees_shape_is_by_rank_and_its_laws_are_kept():
    made, noise = proposed(learned.SAMPLED, 0.7, 1.5)
    found, laws = jax.device_get((made.candidates, made.laws))
    # Nothing that tau and sharpness could follow.
    assert made.extra[2] is None
    ids = np.asarray(weights().params.draft_ids)
    assert np.array_equal(laws.draft_ids, ids) and laws.probs.shape == (NUM, 5, 30)
    for shape in (found.parents, found.depths, found.scores, laws.behind):
        assert np.array_equal(shape[0], shape[1])
    for row in range(NUM):
        wanted_laws, paths = {}, {-1: ()}
        wanted = slow_draft(row, noise, 1.0, 1.0, 0.7, wanted_laws)
        assert children_of(found, row) == wanted
        np.testing.assert_allclose(laws.probs[row, 0], wanted_laws[()], atol=1e-6)
        for i, token in enumerate(found.tokens[row]):
            paths[i] = (*paths[int(found.parents[row, i])], int(token))
            slot = laws.behind[row, i]
            assert (slot > 0) == (paths[i] in wanted)
            if slot:
                law = wanted_laws[paths[i]]
                np.testing.assert_allclose(laws.probs[row, slot], law, atol=1e-6)
    assert laws.behind.max(axis=1).tolist() == [4, 4]
    # Over all tokens those that cannot be drafted have nothing.
    spread = np.asarray(made.laws.of_all_tokens(laws.probs, hosts.CFG.vocab_size))
    np.testing.assert_array_equal(spread[..., ids], laws.probs)
    np.testing.assert_allclose(spread.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("budget,expanded", BUDGETS)
def test_only_nodes_whose_children_may_be_verified_are_expanded(budget, expanded):
    """Under a budget the best of the batch are those of whole trees."""
    strategy = dataclasses.replace(STRATEGY, budget=budget)
    made, noise = proposed(True, 1.0, 1.0, strategy)
    found = jax.device_get(made.candidates)
    # Expanded nodes of each row, and all nodes of the batch with their scores.
    num_expanded, best, wanted = [], [], []
    for row in range(NUM):
        here, whole = children_of(found, row), slow_draft(row, noise, 0.6, 1.0, 1.0)
        num_expanded.append(len(here))
        for path, pairs in here.items():
            assert [t for t, _ in pairs] == [t for t, _ in whole[path]]
        for nodes, tree in ((best, here), (wanted, whole)):
            scores = {(): 0.0}
            for path, pairs in sorted(tree.items(), key=lambda one: len(one[0])):
                for token, gain in pairs:
                    scores[*path, token] = scores[path] + gain
                    nodes.append((scores[path] + gain, row, *path, token))
    assert num_expanded == expanded
    best, wanted = (sorted(x)[::-1][: budget - NUM] for x in (best, wanted))
    assert [n[1:] for n in best] == [n[1:] for n in wanted]
    np.testing.assert_allclose([n[0] for n in best], [n[0] for n in wanted], atol=5e-5)


@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_best_of_are_the_largest(k):
    scores = np.random.default_rng(k).normal(size=(3, 2, 50)).astype(np.float32)
    values, ids = jax.jit(expansion.best_of, static_argnums=1)(scores, k)
    order = np.argsort(-scores, axis=-1)[..., :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, order, -1))


@pytest.mark.parametrize(
    "strategy,live,alive,wanted",
    [
        # Of 9 nodes three are roots: five found ones score as high as the first row's
        # live one, itself among them, and six as high as the second row's.
        ("D4K1V5N9", (-0.5, -0.7, -9), (1, 1, 1), True),
        ("D4K1V5N9", (-9, -0.7, -9), (1, 1, 1), False),
        # A row that has ended neither goes on nor takes anybody's room.
        ("D4K1V5N6", (-9, -0.7, -0.1), (1, 1, 0), True),
        ("D4K1V5N5", (-9, -0.9, -0.1), (1, 1, 0), False),
        # A row has all that it may have, though there is room for others.
        ("D2K1V3N8", (-0.6, -9, -9), (1, 1, 1), False),
        ("D2K1V3N8", (-0.3, -9, -9), (1, 1, 1), True),
        # Nobody shares: only a row's own nodes count, and of the third row's two.
        ("D4K1V5", (-0.6, -9, -9), (1, 1, 1), True),
        ("D2K2V3", (-0.6, -0.75, -9), (1, 1, 1), True),
        ("D2K2V3", (-0.6, -0.7, -9), (1, 0, 1), False),
    ],
)
def test_no_level_is_drafted_that_cannot_enter(strategy, live, alive, wanted):
    found = np.array([[-0.2, -0.5, -np.inf], [-0.7, -0.8, -1.5], [-0.1, -0.3, -0.4]])
    none = np.zeros((3, 3), np.int32)
    settings = decode.Settings(hosts.CFG)
    grow = expansion.Expansion(strategy_lib.parse(strategy), settings, CFG, False)
    level = expansion.Level(
        candidates_lib.Candidates(none, none, none, jnp.asarray(found)),
        tokens=none[:, :1],
        scores=jnp.array(live)[:, None],
        index=none[:, :1],
        probs=None,
    )
    matters = grow.may_matter(level, jnp.array(alive, bool))
    assert bool(matters.any()) == wanted
