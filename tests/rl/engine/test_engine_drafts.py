"""What the engine keeps for drafting, against forwards over whole texts.

Tokens are the target's whatever is drafted, so an error in the drafter's pages costs
speed and shows in no text: here its pages are compared after every call, and how many
drafts are accepted is a literal.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import engines
from tests.rl.engine import test_engine_speculation as speculation
from tlt_jax import types
from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.specdec import rooms, strategy

OTHERS = engines.params_of(3)


def whole_texts(cfg):
    """Keys and values of the drafter over a whole text, `[K, H, S]`."""

    @jax.jit
    def fn(params, drafter_params, text):
        positions = jnp.arange(text.shape[0])[None]
        out = transformer.forward(
            *(params, engines.CFG, text[None], positions), features=cfg.feature_layers
        )
        features = transformer.drafter_features(out)
        drafted = drafter.forward(
            drafter_params,
            cfg,
            drafter.embed(params, jnp.roll(text, -1)[None]),
            drafter.fuse(drafter_params, cfg, features),
            positions,
        )
        return drafted.keys[:, :, 0], drafted.values[:, :, 0]

    return fn


class Watched:
    """Compares the drafter's pages of every row after every call."""

    def __init__(self, engine, monkeypatch):
        cfg = engine._speculator.cfg.drafter_cfg
        self.engine, self.fn = engine, whole_texts(cfg)
        self.drafter = speculation.drafter_params(cfg)
        self.params, self.num_checked = engines.PARAMS, 0
        kept = engine_lib.Engine._kept

        def check(engine, rows, result):
            finished = kept(engine, rows, result)
            for row in rows:
                self.check(row)
            return finished

        monkeypatch.setattr(engine_lib.Engine, "_kept", check)

    def check(self, row):
        wanted = self.fn(self.params, self.drafter, engines.padded(row.text()))
        cache = self.engine._caches.drafter
        for pages, columns in zip((cache.keys, cache.values), wanted, strict=True):
            own = np.moveaxis(np.asarray(pages)[0, row.pages], 0, -2)
            own = own.reshape(*own.shape[:2], -1)[..., : row.drafted]
            np.testing.assert_allclose(own, columns[..., : row.drafted], atol=1e-5)
        self.num_checked += row.drafted


@pytest.mark.parametrize(
    "table,cfg",
    [
        ("by rows", speculation.EAGLE),
        ("by rows", speculation.DRAFTER),
        ("shared", speculation.DRAFTER),
        ("shared", speculation.BLOCK),
    ],
    ids="eagle fused shared block".split(),
)
def test_drafter_pages_are_those_of_whole_texts(monkeypatch, table, cfg):
    """Pages that are shared, reused, put back, and of weights that came later."""
    engine = speculation.engine_of(table, cfg, **speculation.SMALL)
    watched = Watched(engine, monkeypatch)
    _, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert stats.num_preempted > 0 and watched.num_checked > 250
    for number in (1, 2):
        # A target of its own, then a drafter of its own.
        if number == 1:
            watched.params = OTHERS
            engine.set_params(OTHERS, version=1)
        else:
            watched.drafter = speculation.drafter_params(cfg, 1)
            engine.set_drafter(watched.drafter, version=1)
        engine.run(engines.REQUESTS[:6], engines.SEED)
    engine.pool.close()


ONE_ROW = dict(page_size=16, prefill_chunk=16, max_rows=1)
# How often at least so many drafted tokens were accepted.
ACCEPTED = {
    "eagle": [76, 26, 9, 4],
    "some tokens": [80, 28, 8, 1],
    "block": [94, 15, 4, 0],
}
DRAFTERS = {
    "eagle": speculation.EAGLE,
    "some tokens": speculation.DRAFTER,
    "block": speculation.BLOCK,
}


@pytest.mark.parametrize(
    "sizes",
    [
        dict(page_size=4, prefill_chunk=8),
        ONE_ROW,
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ACCEPTED)
def test_as_many_drafts_are_accepted_whatever_the_pages(name, sizes):
    """Native kernels; no call cuts an accepted run."""
    more = dict(steps_per_call=32, cpu_kernels="native")
    engine = speculation.engine_of("chain", DRAFTERS[name], **sizes | more)
    _, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert stats.num_accepted == ACCEPTED[name]
    # Of a chain every draft behind an accepted one had its chance.
    tried, _, true = map(sum, stats.reliability)
    assert (tried, true) == (sum(stats.num_tried), sum(ACCEPTED[name][1:]))
    _, accepted = stats.by_rank
    assert sum(accepted) == sum(ACCEPTED[name][1:])
    if sizes is ONE_ROW:
        # A chain's node stands in the place of its depth.
        assert [n for n in accepted if n] == [n for n in ACCEPTED[name][1:] if n]
    engine.pool.close()


# Batches of four with 10 nodes of 16: the row that guesses best gets most of them; by
# another tau of the drafter others.
SHARED = {"some tokens": [83, 28, 6, 0], "block": [98, 12, 2, 0]}
SHARED_BY_TAU = [81, 29, 7, 0]
# Of one level, two, and all three: accepted within half a node a row, one, and all.
BY_ROOM = {1: [21, 29, 29], 2: [21, 30, 36], 3: [21, 30, 34]}


@pytest.mark.parametrize(
    "name,kernels", [(name, x) for name in SHARED for x in ("native", "xla")]
)
def test_rows_that_share_have_as_many_accepted(name, kernels, monkeypatch):
    engine = speculation.engine_of(
        "chain",
        DRAFTERS[name],
        dict(table=strategy.parse_arms(("4:D3K1V4N10",))),
        **dict(page_size=4, prefill_chunk=8, steps_per_call=32, cpu_kernels=kernels),
    )
    calls, took = [], engine._speculator.took

    def watched(rows, call, progress):
        calls.append(call)
        took(rows, call, progress)

    monkeypatch.setattr(engine._speculator, "took", watched)
    _, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert stats.num_accepted == SHARED[name]
    by_room = np.sum([call.accepted_by_room for call in calls], axis=0)
    assert by_room[3, -1] == sum(SHARED[name][1:]) == sum(stats.by_rank[1])
    assert by_room[0, -1] == sum(stats.by_rank[0])
    if name == "some tokens":
        columns = [rooms.ROOMS.index(room) for room in (0.5, 1, math.inf)]
        assert {d: by_room[d, columns].tolist() for d in (1, 2, 3)} == BY_ROOM
        params = speculation.drafter_params(speculation.DRAFTER)
        engine.set_drafter(params.replace(tau=np.float32(4)), version=1)
        _, stats = engine.run(engines.REQUESTS, engines.SEED)
        assert stats.num_accepted == SHARED_BY_TAU
    engine.pool.close()


def test_pages_that_get_other_prompts_are_filled_anew():
    """The third prompt gets the pages of the first: none of it is there yet."""
    sizes = ONE_ROW | dict(steps_per_call=32, cpu_kernels="native")
    engine = speculation.engine_of("chain", speculation.EAGLE, **sizes)
    rng = np.random.default_rng(6)
    # 32 cached positions are two full pages; one more holds what is drawn.
    requests = [
        types.Request(n, n, 0, rng.integers(3, 32, 33).astype(np.int32), 6)
        for n in range(3)
    ]
    _, stats = engine.run(requests, engines.SEED)
    assert stats.num_fill_tokens == 3 * 32
    # As many drafts are accepted as where each has the cache for itself.
    alone = [engine.run([one], engines.SEED)[1].num_accepted for one in requests]
    assert stats.num_accepted == np.sum(alone, axis=0).tolist()
    engine.pool.close()


def test_a_run_begins_with_what_matches_did_before_discounted():
    engine = speculation.engine_of("ngram", None, max_rows=1)
    state = engine._speculator
    state._outcomes = np.full_like(state._outcomes, 100)
    engine.run(engines.REQUESTS[:1], engines.SEED)
    assert state.cfg.texts.discount < 1
    assert state._outcomes.min() == np.float32(100 * state.cfg.texts.discount)
    engine.pool.close()
