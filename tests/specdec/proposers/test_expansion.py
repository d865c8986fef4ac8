"""How many nodes a level of the drafter's tree has columns for, under a budget."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import hosts
from tests.specdec.proposers import test_learned
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import candidates, decode
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import expansion


def expansion_of(text, keep_laws=False):
    settings = decode.Settings(hosts.CFG)
    strategy = strategy_lib.parse(text)
    return expansion.Expansion(strategy, settings, test_learned.CFG, keep_laws)


@pytest.mark.parametrize(
    "text,num_rows,most,spans",
    [
        # Of 31 nodes beside one root two to a row, three, ...: never more than fit.
        ("D7K1V8N32", 16, [15, 10, 7, 6, 5, 4], ((3, 15), (7, 7))),
        ("D7K1V8N48", 16, [16, 15, 11, 9, 7, 6], ((5, 16), (7, 7))),
        ("D7K1V8", 16, [16] * 6, ((7, 16),)),
        # Levels that nobody reaches are none.
        ("D4K1V5N4", 2, [1, 1, 0], ((3, 1),)),
        # Four rows have two nodes and a path of one; the fifth has one and a path.
        ("D3K2V7N15", 6, [9, 6], ((3, 9),)),
        # A row verifies three nodes: one child, behind one node.
        ("D2K2V3N9", 4, [4], ((2, 4),)),
        ("D3K2V7N15", 1, [2, 2], ((3, 2),)),
        ("D1K2V3", 4, [], ()),
    ],
)
def test_columns_are_as_many_as_nodes_can_matter(text, num_rows, most, spans):
    grow = expansion_of(text)
    levels = range(2, grow.strategy.draft_depth + 1)
    assert [grow.most_expanded(num_rows, level) for level in levels] == most
    assert grow.spans(num_rows) == spans
    if spans:
        # A tree that is sampled stands as it is.
        every = ((levels[-1], num_rows * grow.strategy.topk),)
        assert expansion_of(text, keep_laws=True).spans(num_rows) == every


@functools.cache
def growth(text):
    """What matters before each level, of scores given and rows alive."""
    grow = expansion_of(text)

    @jax.jit
    def fn(gains_LBEE, alive_B):
        ids_BEE = jnp.zeros(gains_LBEE.shape[1:], jnp.int32)
        live = grow.begun(ids_BEE[:, :1], gains_LBEE[0, :, :1], None, None)
        found = []
        for level in range(2, grow.strategy.draft_depth + 1):
            found.append(grow.may_matter(live, alive_B))
            gains_BEE = gains_LBEE[level - 1]
            live = grow.grown(jnp.int32(level), live, ids_BEE, gains_BEE, None, None)[0]
        return jnp.sum(jnp.stack(found), axis=(1, 2))

    return grow, fn


@pytest.mark.parametrize(
    "text,num_rows",
    [("D5K1V6N14", 6), ("D4K2V9N19", 5), ("D4K2V5N12", 5), ("D3K3V7N16", 4)],
)
def test_never_more_nodes_matter_and_at_times_as_many(text, num_rows):
    grow, fn = growth(text)
    depth, topk = grow.strategy.draft_depth, grow.strategy.topk
    rng, most = np.random.default_rng(0), np.zeros(depth - 1, int)
    bound = [grow.most_expanded(num_rows, level) for level in range(2, depth + 1)]
    trials = itertools.product(range(1, num_rows + 1), range(1, depth + 1), range(8))
    for num_alive, sure, _ in trials:
        gains = -rng.exponential(size=(depth, num_rows, topk, topk))
        # A path that is sure down to a level, and all that stand there alike.
        gains[:sure, :, 0, 0] = -1e-3
        gains[sure - 1, :, 0] = -1e-3 * rng.random((num_rows, topk))
        gains = np.sort(gains)[..., ::-1].astype(np.float32)
        alive = rng.permutation(num_rows) < num_alive
        here = np.asarray(fn(gains, alive))
        assert np.all(here <= bound)
        most = np.maximum(most, here)
    assert most.tolist() == bound


@pytest.mark.parametrize("budget", [0, 6])
def test_slopes_stand_beside_their_candidates(budget):
    """Also of nodes that lay side by side: against a sharpness a little larger."""
    strategy = dataclasses.replace(test_learned.STRATEGY, budget=budget)
    logs, slopes = [], None
    for sharpness in (1.004, 1.0):
        made, _ = test_learned.proposed(True, 1.0, sharpness, strategy)
        found, slopes = made.candidates, made.extra[2]
        logs.append(np.log(np.maximum(candidates.chances(found), 1e-30)))
    present = np.asarray(found.present())
    wanted = (logs[0] - logs[1]) / np.log(1.004)
    assert present.sum() >= 12 and np.ptp(wanted[present]) > 1
    found = np.asarray(slopes.by_sharpness)
    np.testing.assert_allclose(found[present], wanted[present], atol=0.02)


def test_deep_levels_of_chains_have_few_columns(monkeypatch):
    """What the drafter's forward is asked to read, and the drafts that come of it."""
    strategy, seen = strategy_lib.parse("D4K1V5N4"), []
    forward = drafter.forward

    def counted(params, cfg, embedded, *args, **options):
        seen.append(embedded.shape[1] * embedded.shape[2])
        return forward(params, cfg, embedded, *args, **options)

    test_learned.draft_program.cache_clear()
    monkeypatch.setattr(drafter, "forward", counted)
    packed, _ = test_learned.proposed(True, 1.0, 1.0, strategy)
    # Of the fill; what is taken in, side by side; one column for two rows.
    assert seen[1:] == [4, 1]
    test_learned.draft_program.cache_clear()
    every = ((strategy.draft_depth, test_learned.NUM),)
    monkeypatch.setattr(expansion.Expansion, "spans", lambda *_: every)
    whole, _ = test_learned.proposed(True, 1.0, 1.0, strategy)
    test_learned.draft_program.cache_clear()
    found, wanted = jax.device_get((packed.candidates, whole.candidates))
    best = np.sort(wanted.scores.reshape(-1))[::-1][: 4 - test_learned.NUM]
    chosen = wanted.scores >= best[-1]
    assert chosen.sum() == 2
    np.testing.assert_array_equal(found.tokens[chosen], wanted.tokens[chosen])
    np.testing.assert_allclose(found.scores[chosen], wanted.scores[chosen], rtol=1e-5)
    assert np.sort(found.scores.reshape(-1))[::-1][1] >= best[-1] - 1e-5
