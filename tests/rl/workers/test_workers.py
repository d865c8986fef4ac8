"""Workers: the tokens of one engine, whoever generates them, and whoever fails."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from tests.rl import engines
from tests.rl.engine.test_engine_speculation import EAGLE, drafter_params
from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import speculator
from tlt_jax.rl.workers import coordinator, records, workers
from tlt_jax.runtime import failures, programs
from tlt_jax.specdec import noise, strategy

FUSED = drafter.of_target(engines.CFG, feature_layers=(0, 1))


def workers_of(first, number, **limits):
    made = [engines.engine_of(first.pool, max_rows=2) for _ in range(number)]
    return workers.Workers(made, records.Config(**limits))


def run(team):
    seen, shown = [], []
    completions, stats = team.run(
        engines.REQUESTS,
        engines.SEED,
        on_completion=seen.append,
        on_call=lambda *counts: shown.append(counts),
    )
    assert sorted(c.request_id for c in seen) == sorted(
        r.request_id for r in engines.REQUESTS
    )
    assert stats.num_tokens == sum(len(c.tokens) for c in completions)
    assert shown[-1][1] <= stats.num_tokens
    return [(c.request_id, c.tokens.tolist(), c.finish_reason) for c in completions]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_tokens_do_not_depend_on_the_number_of_workers(first, expected, number):
    team = workers_of(first, number)
    for _ in range(2):
        assert run(team) == expected
        spans = team.coordination.timeline()
        assert not team.lost
        assert 0 <= coordinator.sums(spans)["workers/idle_frac"] < 1
        assert {i.worker for i in spans} == set(range(number))
    with pytest.raises(ValueError, match="requests is empty"):
        team.run([], 0)
    team.coordination.close()


def test_a_worker_that_dies_is_replaced_by_the_others(first, expected):
    team = workers_of(first, 3)
    begun = threading.Barrier(3)
    decode_call = engine_lib.Engine._decode_call

    def failing(engine, plan, *rest):
        finished = decode_call(engine, plan, *rest)
        begun.wait(20)
        if engine is team.engines[1]:
            raise MemoryError("no room")
        engine._decode_call = decode_call.__get__(engine)
        return finished

    for engine in team.engines:
        engine._decode_call = failing.__get__(engine)
    assert run(team) == expected
    assert team.lost == {1: "MemoryError: no room"}
    assert team.coordination.state.which(records.Activity.LOST) == (1,)
    # It is left out from now on.
    assert run(team) == expected
    assert {i.worker for i in team.coordination.timeline()} == {0, 2}
    team.coordination.close()


def test_a_worker_that_hangs_is_given_up(first, expected):
    team = workers_of(first, 2, heartbeat_timeout_s=6.0)
    woken, ended = threading.Event(), threading.Event()
    decode_call, serve = engine_lib.Engine._decode_call, engine_lib.Engine.serve

    def hanging(engine, *rest):
        woken.wait(30)
        return decode_call(engine, *rest)

    def serving(engine, *args, **kwargs):
        try:
            return serve(engine, *args, **kwargs)
        finally:
            ended.set()

    team.engines[0]._decode_call = hanging.__get__(team.engines[0])
    team.engines[0].serve = serving.__get__(team.engines[0])
    assert run(team) == expected
    assert "silent for" in team.lost[0]
    # What it says when it comes to life again counts no more.
    woken.set()
    assert ended.wait(20)
    assert run(team) == expected
    team.coordination.close()


def test_a_rollout_is_given_up_and_its_workers_end(first):
    team, ended = workers_of(first, 2), threading.Semaphore(0)
    serve = engine_lib.Engine.serve

    def serving(engine, *args, **kwargs):
        try:
            return serve(engine, *args, **kwargs)
        finally:
            ended.release()

    for engine in team.engines:
        engine.serve = serving.__get__(engine)
    calls = []

    def abandon(*counts):
        calls.append(counts)
        team.abandon()

    for _ in range(2):
        with pytest.raises(failures.Abandoned):
            team.run(engines.REQUESTS, engines.SEED, on_call=abandon)
    # The second one was given up before it began.
    assert calls and all(ended.acquire(timeout=20) for _ in range(2))
    assert not team.lost and team.take_intervals() == []
    team.coordination.close()


def test_what_workers_wait_for_compilers_stands_apart(first, expected):
    team = workers_of(first, 2)
    serve = engine_lib.Engine.serve

    def waiting(engine, *args, **kwargs):
        # As if it had waited for all of a second before this rollout, and for a bit.
        began = time.perf_counter()
        time.sleep(0.05)
        engine.pool.stats.waits.append((began, time.perf_counter()))
        return serve(engine, *args, **kwargs)

    one = team.engines[1]
    one.pool = programs.ProgramPool()
    one.pool.get, one.serve = first.pool.get, waiting.__get__(one)
    one.pool.stats.waits.append((0.0, 1.0))
    assert run(team) == expected
    spent = dict.fromkeys((0, 1), 0.0)
    for interval in team.take_intervals():
        if interval.activity == records.Activity.COMPILING:
            spent[interval.worker] += interval.stop_s - interval.start_s
    began, ended = one.pool.stats.waits[1]
    assert spent == {0: 0.0, 1: pytest.approx(ended - began, abs=0.045)}
    team.coordination.close()


def test_without_a_worker_the_run_stops_with_the_reasons(first):
    team = workers_of(first, 2)

    def fail(*_, **__):
        raise OSError("the device is gone")

    for engine in team.engines:
        engine.serve = fail
    for _ in range(2):
        with pytest.raises(failures.TrainingError) as raised:
            team.run(engines.REQUESTS, engines.SEED)
        assert "worker 0: OSError: the device is gone; worker 1" in str(raised.value)
        assert "resumes from the newest checkpoint" in str(raised.value)
    team.coordination.close()


def adapted(cfg, entries):
    engine = engine_lib.Engine(
        engines.CFG,
        dataclasses.replace(engines.BASE, max_rows=2),
        speculator_cfg=speculator.SpeculatorConfig(
            strategy.parse_arms(entries), cfg, capture=True
        ),
    )
    engine.set_params(engines.PARAMS, version=3)
    engine.set_drafter(drafter_params(cfg), version=0)
    return engine


@pytest.mark.parametrize(
    "cfg,entries",
    [(FUSED, ()), (FUSED, ("2:D2K1V3",)), (EAGLE, ("1:D2K1V3",))],
    ids=["fused, plain", "fused, speculative", "last"],
)
def test_captured_features_are_those_of_a_forward(cfg, entries):
    """They were written by prefill, decoding and verification."""
    engine = adapted(cfg, entries)
    team = workers.Workers([engine])
    texts = []
    team.on_text = texts.append
    completions, _ = team.run(engines.REQUESTS, engines.SEED)
    assert len(texts) == len(completions) == len(engines.REQUESTS)
    asked = {r.request_id: r for r in engines.REQUESTS}
    drawn = {c.request_id: c.tokens for c in completions}
    keys = noise.request_keys(engines.SEED, [t.text_id for t in texts])
    for text, key in zip(texts, keys, strict=True):
        prompt = asked[text.text_id].prompt
        whole = np.concatenate([prompt, drawn[text.text_id]])
        np.testing.assert_array_equal(text.tokens, whole)
        assert text.response_start == len(prompt) and text.version == 3
        np.testing.assert_array_equal(text.key, key)
        hidden, fused = forward(whole, cfg.feature_layers)
        known = len(whole) - 1
        np.testing.assert_allclose(text.hidden[:known], hidden[:known], atol=1e-4)
        if cfg.feature_layers:
            np.testing.assert_allclose(text.features[:known], fused[:known], atol=1e-4)
        else:
            assert text.features is None
        assert not text.hidden[known:].any()
    team.close()


def forward(text, layers):
    tokens = engines.padded(text)[None]
    positions = np.arange(tokens.shape[1])[None]
    out = _forward(tokens, positions, layers)
    fused = [np.asarray(x)[:, 0].T for x in out.features]
    return np.asarray(out.hidden)[:, 0].T, np.concatenate(fused, 1) if fused else None


def _forward(tokens, positions, layers):
    compute = jax.jit(
        lambda p, t, at: transformer.forward(p, engines.CFG, t, at, features=layers)
    )
    return compute(engines.PARAMS, tokens, positions)


def test_a_share_of_the_texts_is_captured_always_the_same():
    engine = adapted(EAGLE, ())
    team = workers.Workers([engine])
    found = []
    for frac in (0.5, 0.5, 0.0):
        texts = []
        team.on_text, team.capture_frac = texts.append, frac
        team.run(engines.REQUESTS, engines.SEED)
        found.append({text.text_id for text in texts})
    assert found[0] == found[1] and 0 < len(found[0]) < len(engines.REQUESTS)
    assert not found[2]
    team.close()


def test_a_drafter_is_taken_up_between_decode_calls(expected):
    engine = adapted(EAGLE, ("2:D2K1V3",))
    engine.warm_up()
    num_compiled = engine.pool.stats.num_compiled
    team = workers.Workers([engine])
    versions = []

    def offer(num_done, num_tokens):
        del num_done, num_tokens
        versions.append(team.drafter_version)
        team.offer_drafter(drafter_params(EAGLE, len(versions)), len(versions))

    completions, stats = team.run(engines.REQUESTS, engines.SEED, on_call=offer)
    found = [(c.request_id, c.tokens.tolist(), c.finish_reason) for c in completions]
    assert found == expected
    assert versions == list(range(len(versions))) and len(versions) > 4
    # Every version begins with what the rows have so far.
    assert stats.num_fill_tokens > 10 * len(versions)
    assert engine.pool.stats.num_compiled == num_compiled
    team.close()
