"""What prefilling and filling write: which call has which part, and which page what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import engines
from tests.rl.engine.test_engine_speculation import EAGLE, engine_of
from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import cache_writer, scheduler
from tlt_jax.rl.engine import stats as rollout_stats

PAGE = engines.BASE.page_size


def test_what_is_left_most_goes_first_in_calls_of_four():
    calls = list(cache_writer._calls([20, 3, 9, 1, 8], chunk=8))
    assert calls == [
        [(0, 0), (2, 0), (4, 0), (1, 0)],
        [(0, 8), (2, 8), (3, 0)],
        [(0, 16)],
    ]
    assert cache_writer.BUCKETS == (1, 2, 4)
    assert list(cache_writer._calls([], chunk=8)) == []


@pytest.fixture(scope="module")
def engine():
    made = engine_of("chain", EAGLE)
    yield made
    made.pool.close()


def columns(pages, table):
    """What pages hold of the first layer and head, `[H, positions]`."""
    own = np.asarray(pages)[0, list(table), 0]
    return np.concatenate(list(own), axis=-1)


@jax.jit
def forwards(tokens, weights):
    """Keys of the target and of the drafter over one text, `[H, T]`."""
    positions = jnp.arange(tokens.shape[0])[None]
    out = transformer.forward(engines.PARAMS, engines.CFG, tokens[None], positions)
    drafted = drafter.forward(
        weights.params,
        EAGLE,
        weights.embedded(jnp.roll(tokens, -1)[None], jnp.float32),
        drafter.fuse(weights.params, EAGLE, transformer.drafter_features(out)),
        positions,
    )
    return out.keys[0][0, :, 0], drafted.keys[0, :, 0]


def test_pages_hold_the_texts_that_they_were_written_for(engine):
    text = np.random.default_rng(0).integers(3, 32, 15).astype(np.int32)
    weights, stats = engine._speculator.weights, rollout_stats.RolloutStats()
    wanted, drafted = map(np.asarray, forwards(text, weights))
    caches = engine.pool.get(engine.programs.empty_caches())()
    # A prompt of 10 cached positions, a row that comes back and shares its two full
    # pages, and a copy of the prompt's last page for another row.
    admission = scheduler.Admission(
        prompts=[scheduler.Part(text[:10], 0, 10, (7, 3, 5))],
        returns=[scheduler.Part(text[:14], 8, 14, (7, 3, 8, 2))],
        copies=[(5, 9)],
    )
    caches = engine._writer.admit(caches, engine.params, admission, stats)
    assert stats.num_prefill_tokens == 10 + 6
    np.testing.assert_allclose(
        columns(caches.target.keys, (7, 3, 5))[:, :10], wanted[:, :10], atol=1e-5
    )
    np.testing.assert_allclose(
        columns(caches.target.keys, (7, 3, 8, 2))[:, :14], wanted[:, :14], atol=1e-5
    )
    copied = [columns(caches.target.keys, (page,)) for page in (5, 9)]
    np.testing.assert_array_equal(*copied)
    untouched = [1, 4, 6, *range(10, engine.engine_cfg.total_pages)]
    assert not columns(caches.target.keys, untouched).any()
    assert not np.asarray(caches.drafter.keys).any()

    rounds = [
        [scheduler.Part(text[:14], 0, 8, (7, 3, 8, 2))],
        [scheduler.Part(text[:14], 8, 13, (7, 3, 8, 2))],
    ]
    caches = engine._writer.fill(caches, engine.params, weights, rounds, stats)
    assert stats.num_fill_tokens == 8 + 5
    np.testing.assert_allclose(
        columns(caches.drafter.keys, (7, 3, 8, 2))[:, :13], drafted[:, :13], atol=1e-5
    )
    assert not columns(caches.drafter.keys, [5, 9, *untouched]).any()


def test_nothing_to_do_does_nothing(engine):
    stats = rollout_stats.RolloutStats()
    nothing = scheduler.Admission()
    caches = object()
    assert engine._writer.admit(caches, None, nothing, stats) is caches
    assert engine._writer.fill(caches, None, None, [], stats) is caches
    assert stats == rollout_stats.RolloutStats()
