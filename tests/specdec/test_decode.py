"""Decode programs against a loop that computes the whole text anew for every token."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import hosts
from tlt_jax.specdec import decode

WIDE = dict(bucket=8, page_size=4, chunk=4)
NARROW = dict(bucket=3, page_size=8, chunk=16)


@pytest.mark.parametrize(
    "sampling_cfg,options",
    [
        (hosts.PLAIN, WIDE),
        (hosts.PLAIN, WIDE | dict(share=True)),
        (hosts.PLAIN, WIDE | dict(steps=(1, 4, 2))),
        (hosts.PLAIN, WIDE | dict(quotas=(1, 2))),
        (
            hosts.PLAIN,
            WIDE | dict(order=(6, 2, 7, 0, 5, 4, 1, 3), shuffle=True, steps=(2, 6)),
        ),
        (hosts.PLAIN, WIDE | dict(order=(5, 1, 6))),
        (hosts.PLAIN, NARROW | dict(form="unstacked", quotas=(1,))),
        (hosts.TRUNCATED, NARROW | dict(steps=(3,))),
        (hosts.GREEDY, WIDE),
    ],
    ids="wide share steps quota shuffled padded narrow truncated greedy".split(),
)
def test_tokens_are_those_of_the_slow_loop(sampling_cfg, options):
    options = dict(options)
    order = options.pop("order", range(8))
    steps = options.pop("steps", (hosts.MAX_STEPS,))
    quotas = options.pop("quotas", (99,))
    shuffle, chunk = options.pop("shuffle", False), options.pop("chunk")
    rng = np.random.default_rng(0)
    rows = [hosts.asks()[i] for i in order]
    for start in range(0, len(rows), options["bucket"]):
        host = hosts.Host(rows[start : start + options["bucket"]], **options)
        host.prefill(chunk)
        i = 0
        while any(ask.remaining for ask in host.rows):
            host.call(sampling_cfg, steps[i % len(steps)], quotas[i % len(quotas)])
            if shuffle:
                host.shuffle(rng)
            i += 1
        host.check_cache()
    hosts.assert_equal_to_reference(rows, sampling_cfg)


def test_the_reference_covers_what_it_should():
    for sampling_cfg in (hosts.PLAIN, hosts.TRUNCATED):
        rows = hosts.reference(sampling_cfg)
        ended = [ask.drawn[-1] in hosts.EOS for ask in rows]
        assert any(ended) and not all(ended)
        assert [
            len(ask.drawn) for ask in rows if not any(np.isin(ask.drawn, hosts.EOS))
        ] == [ask.limit for ask, e in zip(rows, ended, strict=True) if not e]
        # Equal prompts, other requests: other tokens.
        assert len({tuple(ask.drawn) for ask in rows[:3]}) == 3
    first, second, third = hosts.reference(hosts.GREEDY)[:3]
    assert first.drawn == second.drawn == third.drawn


def test_a_call_returns_when_enough_rows_finished():
    finish_steps = sorted(len(ask.drawn) for ask in hosts.reference(hosts.PLAIN))
    for quota in (1, 2, 99):
        host = hosts.Host(hosts.asks(), bucket=8, page_size=4)
        host.prefill(4)
        emitted = host.call(hosts.PLAIN, finish_quota=quota)
        wanted = finish_steps[quota - 1] if quota <= 8 else finish_steps[-1]
        assert emitted.num_steps == min(wanted, hosts.MAX_STEPS)


def test_a_call_without_work_changes_nothing():
    host = hosts.Host(hosts.asks(), bucket=8, page_size=4)
    host.prefill(4)
    for settings in (dict(step_limit=0), dict(finish_quota=0)):
        emitted = host.call(hosts.PLAIN, **settings)
        assert emitted.num_steps == 0 and not emitted.ended.any()
    for ask in host.rows:
        ask.limit = 0
    assert host.call(hosts.PLAIN).num_steps == 0


def test_finished_rows_ride_along_and_write_nowhere():
    host = hosts.Host(hosts.asks(), bucket=8, page_size=4)
    host.prefill(4)
    for ask in host.rows[::2]:
        ask.limit = 0
    emitted = host.call(hosts.PLAIN)  # checks the pages
    assert emitted.counts[::2].tolist() == [0] * 4
    assert emitted.counts[1::2].min() > 0
    # They go on later as if nothing had been.
    for ask, whole in zip(host.rows, hosts.asks(), strict=True):
        ask.limit = whole.limit
    while any(ask.remaining for ask in host.rows):
        host.call(hosts.PLAIN)
    hosts.assert_equal_to_reference(host.rows, hosts.PLAIN)


def test_another_batch_of_the_bucket_compiles_nothing():
    sizes = []
    for rows in (hosts.asks()[:3], hosts.asks()[3:]):
        host = hosts.Host(rows, bucket=8, page_size=4, seed=3)
        host.prefill(4)
        host.call(hosts.PLAIN, step_limit=2, finish_quota=3)
        sizes.append(
            (
                hosts.decode_program(hosts.PLAIN)._cache_size(),
                hosts.prefill_program()._cache_size(),
            )
        )
    assert sizes[0] == sizes[1]


def test_is_any_finds_ids():
    tokens = jnp.array([[1, 7], [50, 51]])
    assert decode.is_any(tokens, hosts.EOS).tolist() == [[False, True], [True, False]]
    assert not decode.is_any(tokens, ()).any()
