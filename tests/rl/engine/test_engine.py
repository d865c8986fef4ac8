"""The engine: tokens follow from model, law, seed and request alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import engines
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.runtime import sharding
from tlt_jax.specdec import sampling

EOS = engines.EOS
CFG = engines.CFG
BASE = engines.BASE
SMALL = engines.SMALL
ONE_ROW = engines.ONE_ROW
SEED = engines.SEED
PARAMS = engines.PARAMS
REQUESTS = engines.REQUESTS


@pytest.fixture(scope="module")
def engine():
    """An engine of `BASE`, warmed up."""
    engine = engines.engine_of()
    engine.warm_up()
    yield engine
    engine.pool.close()


@pytest.fixture(scope="module")
def small():
    """An engine of `SMALL`, warmed up."""
    engine = engines.engine_of(**SMALL)
    engine.warm_up()
    yield engine
    engine.pool.close()


@pytest.fixture(scope="module")
def expected(engine):
    """Completions of `REQUESTS` by request id."""
    completions, _ = engine.run(REQUESTS, SEED)
    assert [c.request_id for c in completions] == [r.request_id for r in REQUESTS]
    return {c.request_id: c for c in completions}


@pytest.fixture
def compilations():
    """Names of what jax traces, lowers or compiles."""
    events = []

    def listen(name, seconds, **_):
        if name.startswith("/jax/core/compile/"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def assert_same(completions, expected):
    for completion in completions:
        wanted = expected[completion.request_id]
        np.testing.assert_array_equal(completion.tokens, wanted.tokens)
        assert completion.finish_reason == wanted.finish_reason
        np.testing.assert_allclose(
            completion.logprobs, wanted.logprobs, rtol=0, atol=1e-4
        )


def test_tokens_are_those_of_a_full_forward_for_every_token(expected):
    reasons = set()
    for request in REQUESTS[::2]:
        completion = expected[request.request_id]
        tokens, reason = engines.slow(request)
        assert completion.tokens.tolist() == tokens
        assert completion.tokens.dtype == np.int32
        assert completion.finish_reason == reason
        reasons.add(reason)
    assert reasons == {"eos", "length"}


def test_rows_end_with_eos_or_at_their_limit(expected):
    for request in REQUESTS:
        completion = expected[request.request_id]
        assert EOS not in completion.tokens[:-1]
        if completion.finish_reason == "eos":
            assert completion.tokens[-1] == EOS
            assert len(completion.tokens) <= request.max_new_tokens
        else:
            assert completion.finish_reason == "length"
            assert len(completion.tokens) == request.max_new_tokens


def test_logprobs_are_those_of_a_full_forward(expected):
    for request in REQUESTS:
        completion = expected[request.request_id]
        assert completion.logprobs.dtype == np.float32
        exact = engines.exact_logprobs(request, completion)
        np.testing.assert_allclose(completion.logprobs, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [dict(), ONE_ROW, dict(cpu_kernels="xla")],
    ids=["new engine", "one row", "other kernels"],
)
def test_tokens_do_not_depend_on_the_engines_sizes(expected, changes):
    engine = engines.engine_of(**changes)
    completions, stats = engine.run(REQUESTS, SEED)
    assert_same(completions, expected)
    assert stats.num_preempted == 0
    assert max(stats.active_rows) == engine.engine_cfg.max_rows


def test_preempted_rows_go_on_with_the_same_tokens(small, expected):
    completions, stats = small.run(REQUESTS, SEED)
    assert_same(completions, expected)
    assert stats.num_preempted > 0
    assert max(stats.active_rows) == 3


def test_tokens_do_not_depend_on_the_order_of_requests(engine, expected):
    shuffled = [REQUESTS[i] for i in np.random.default_rng(0).permutation(12)[:11]]
    assert len(REQUESTS) == 12
    completions, _ = engine.run(shuffled, SEED)
    assert [c.request_id for c in completions] == [r.request_id for r in shuffled]
    assert_same(completions, expected)
    some = REQUESTS[3:4]
    assert_same(engine.run(some, SEED)[0], expected)
    lengths = {50: 3.0, 53: 20.0, 54: 11.0}
    completions, _ = engine.run(REQUESTS, SEED, expected_lengths=lengths)
    assert [c.request_id for c in completions] == [r.request_id for r in REQUESTS]
    assert_same(completions, expected)


def test_seed_request_and_weights_change_the_tokens(engine, expected):
    def all_tokens(completions):
        return [c.tokens.tolist() for c in completions]

    usual = all_tokens(expected.values())
    other_seed = all_tokens(engine.run(REQUESTS, SEED + 1)[0])
    moved = [dataclasses.replace(r, request_id=r.request_id + 1) for r in REQUESTS]
    other_ids = all_tokens(engine.run(moved, SEED)[0])
    twin = engines.engine_of(pool=engine.pool, params=engines.params_of(1))
    other_weights = all_tokens(twin.run(REQUESTS, SEED)[0])
    for tokens in (other_seed, other_ids, other_weights):
        assert sum(a == b for a, b in zip(tokens, usual, strict=True)) <= 2
    twin.set_params(PARAMS, version=3)
    assert twin.version == 3
    assert_same(twin.run(REQUESTS, SEED)[0], expected)


def test_nothing_is_compiled_after_the_warm_up(small, compilations):
    num_compiled = small.pool.stats.num_compiled
    assert num_compiled == 1 + 3 + 1 + 3  # cache, prefills, copy, decodes
    others = engines.params_of(2)
    compilations.clear()
    rng = np.random.default_rng(3)
    num_preempted = 0
    for run in range(6):
        groups = {
            int(length): rng.integers(1, 13, rng.integers(1, 5)).tolist()
            for length in rng.integers(1, 28, rng.integers(1, 6))
        }
        _, stats = small.run(engines.requests_of(groups), seed=run)
        assert stats.compile_s == 0
        num_preempted += stats.num_preempted
        small.release_cache()
        small.set_params(others if run % 2 else PARAMS, version=run)
    small.set_params(PARAMS, version=0)
    assert num_preempted > 0
    assert compilations == []
    assert small.pool.stats.num_compiled == num_compiled
    jax.jit(lambda x: x + 1)(np.ones(3))
    assert compilations  # they would have been seen


def test_programs_may_be_prepared_in_the_background(expected):
    engine = engines.engine_of()
    engine.warm_up(wait=False)
    completions, stats = engine.run(REQUESTS, SEED)
    assert_same(completions, expected)
    assert stats.compile_s > 0
    assert stats.compile_s >= engine.pool.stats.waited_s
    engine.pool.wait()
    assert engine.pool.stats.num_compiled == 1 + 3 + 1 + 3


def test_a_groups_prompt_is_computed_once(engine):
    groups = {1: (2, 2), 9: (3,) * 6, 14: (3,) * 3}
    _, stats = engine.run(engines.requests_of(groups), SEED)
    assert stats.num_prefill_tokens == 0 + 8 + 13


def test_statistics_count_what_was_done(engine, expected):
    request = max(REQUESTS, key=lambda r: len(expected[r.request_id].tokens))
    (completion,), stats = engine.run([request], SEED)
    num_tokens = len(completion.tokens)
    assert num_tokens > 10
    assert stats.num_tokens == stats.num_steps == stats.num_row_steps == num_tokens
    assert stats.num_calls == math.ceil(num_tokens / 5)
    assert stats.active_rows == [1] * stats.num_calls
    assert len(stats.call_s) == stats.num_calls
    assert stats.decode_s == pytest.approx(sum(stats.call_s))
    assert stats.compile_s == 0
    assert stats.num_prefill_tokens == len(request.prompt) - 1

    completions, stats = engine.run(REQUESTS, SEED)
    lengths = [len(c.tokens) for c in completions]
    assert stats.prefill_s > 0
    assert stats.num_tokens == sum(lengths)
    assert max(lengths) <= stats.num_steps < sum(lengths)
    assert sum(lengths) <= stats.num_row_steps <= 4 * stats.num_steps
    assert len(stats.active_rows) == len(stats.call_s) == stats.num_calls


def test_callbacks_see_every_completion_once_and_progress(engine, expected):
    seen, progress = [], []
    completions, stats = engine.run(
        REQUESTS,
        SEED,
        on_completion=seen.append,
        on_call=lambda *counts: progress.append(counts),
    )
    assert sorted(c.request_id for c in seen) == sorted(expected)
    assert {id(c) for c in seen} == {id(c) for c in completions}
    # A short one is not kept back until the long ones end.
    assert len(seen[0].tokens) < max(len(c.tokens) for c in seen)
    assert progress == sorted(progress)
    assert len(progress) == stats.num_calls
    assert progress[-1] == (len(REQUESTS), stats.num_tokens)


def cut(tokens, reason, stop):
    """The definition: the shortest beginning whose text holds a stop string."""
    for length in range(1, len(tokens) + 1):
        if any(s in engines.letters(tokens[:length]) for s in stop):
            if reason == "eos" and length == len(tokens):
                return tokens, "eos"
            return tokens[:length], "stop"
    return tokens, reason


def test_a_stop_string_ends_the_text_behind_the_token_that_completes_it(
    engine, expected
):
    long = max(expected.values(), key=lambda c: len(c.tokens)).tokens.tolist()
    assert len(long) > 12
    ends = set()
    for end in (3, 5, 6, 7, 10, 11, 12):
        # The last character of one token and the first of the next, twice over.
        stop = (
            engines.letters(long[end - 3 : end - 1])[-1]
            + engines.letters(long[end - 1 : end])[:1]
        )
        twin = engines.engine_of(pool=engine.pool, stop=(stop, "never"))
        completions, stats = twin.run(REQUESTS, SEED)
        for completion in completions:
            whole = expected[completion.request_id]
            tokens, reason = cut(whole.tokens.tolist(), whole.finish_reason, [stop])
            assert completion.tokens.tolist() == tokens
            assert completion.finish_reason == reason
            np.testing.assert_allclose(
                completion.logprobs, whole.logprobs[: len(tokens)], atol=1e-4
            )
            if reason == "stop":
                ends.add(len(tokens))
        assert stats.num_tokens == sum(len(c.tokens) for c in completions)
    # Also those that a call's end divides (calls of 5 tokens), at whatever place.
    assert {5, 6, 7} <= ends and len(ends) > 4


def test_eos_and_a_stop_string_in_one_token_count_as_eos(engine, expected):
    def decode_text(tokens):
        return "".join("." if t == EOS else chr(64 + t) for t in tokens)

    twin = engines.engine_of(pool=engine.pool, stop=(".",), decode_text=decode_text)
    completions, _ = twin.run(REQUESTS, SEED)
    assert_same(completions, expected)
    assert "eos" in {c.finish_reason for c in completions}


def test_tokens_and_logprobs_are_of_one_truncated_law():
    law_cfg = sampling.SamplingConfig(temperature=0.7, top_k=9, top_p=0.9)
    (request,) = engines.requests_of({9: (16,)})
    engine = engines.engine_of(sampling_cfg=law_cfg, **ONE_ROW)
    (completion,), _ = engine.run([request], SEED)
    assert completion.tokens.tolist() == engines.slow(request, law_cfg)[0]
    exact = engines.exact_logprobs(request, completion, law_cfg)
    np.testing.assert_allclose(completion.logprobs, exact, rtol=0, atol=1e-4)


def test_two_devices_draw_the_tokens_of_one(expected):
    mesh = sharding.make_mesh(1, 1, 2, jax.devices()[2:4])
    placed = engines.split(mesh)
    engine = engines.engine_of(params=placed, mesh=mesh, max_rows=1)
    assert engine.params.layers[0].qkv.sharding.shard_shape((2, 4, 4, 16))[0] == 1
    completions, _ = engine.run(REQUESTS[5:8], SEED)
    assert_same(completions, expected)
    # Nor do they exchange the vocabulary's noise.
    program = engine.pool.get(engine.programs.decoding(placed, 1, None))
    assert " all-to-all" not in program.as_text()


def test_bfloat16_follows_its_own_law():
    """Each token is drawn from about the exact law, and reported with its logprob."""
    engine = engines.engine_of(
        params=engines.params_of(0, jnp.bfloat16), dtype="bfloat16", max_rows=1
    )
    requests = engines.requests_of({9: (12, 12), 5: (12,)})
    completions, _ = engine.run(requests, SEED)
    for request, completion in zip(requests, completions, strict=True):
        exact = engines.exact_logprobs(request, completion)
        assert 0 < np.max(np.abs(completion.logprobs - exact)) < 0.1


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda r: [], "requests is empty"),
        (lambda r: [r, r], "request_id twice"),
        (
            lambda r: [dataclasses.replace(r, max_new_tokens=0)],
            "max_new_tokens=0: at least 1",
        ),
        (
            lambda r: [dataclasses.replace(r, max_new_tokens=35)],
            "prompt of 6 tokens .* up to 35 more, .* made for 40",
        ),
        (lambda r: [dataclasses.replace(r, prompt=r.prompt[:0])], "empty prompt"),
        (
            lambda r: [r, dataclasses.replace(r, request_id=1, prompt=r.prompt + 1)],
            "another prompt .* prompt_id=50",
        ),
        (
            lambda r: [dataclasses.replace(r, prompt=r.prompt * 0 + 32)],
            "outside the vocabulary of 32",
        ),
        (lambda r: [dataclasses.replace(r, request_id=-1)], "key word -1"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(engine, change, message):
    (request,) = engines.requests_of({6: (9,)})
    with pytest.raises(ValueError, match=message):
        engine.run(change(request), SEED)


def test_an_engine_says_what_it_lacks():
    engine = engine_lib.Engine(CFG, BASE)
    for call in (engine.warm_up, lambda: engine.run(REQUESTS, SEED)):
        with pytest.raises(ValueError, match="no weights: call set_params"):
            call()
    with pytest.raises(ValueError, match="stop=.* needs decode_text"):
        engine_lib.Engine(CFG, dataclasses.replace(BASE, stop=("a",)))
    with pytest.raises(ValueError, match="cannot be split over 2 devices"):
        mesh = sharding.make_mesh(1, 1, 2, jax.devices()[:2])
        engines.engine_of(mesh=mesh, cpu_kernels="native")
    with pytest.raises(ValueError, match="raise cache.num_pages"):
        engines.engine_of(num_pages=5).run(REQUESTS, SEED)


def test_a_draining_batch_passes_through_the_buckets(engine):
    (request,) = engines.requests_of({6: (34,)})
    many = [dataclasses.replace(request, request_id=i, sample=i) for i in range(30)]
    completions, _ = engine.run(many, SEED)
    full = [i for i, c in enumerate(completions) if c.finish_reason == "length"]
    assert len(full) >= 4
    assert all(len(completions[i].tokens) == 34 for i in full)  # the longest there is
    limits = dict(zip(full, (2, 4, 12, 34), strict=False))
    some = [
        dataclasses.replace(many[i], max_new_tokens=limit)
        for i, limit in limits.items()
    ]
    shorter, stats = engine.run(some, SEED)
    for completion, limit in zip(shorter, limits.values(), strict=True):
        whole = completions[completion.request_id].tokens
        np.testing.assert_array_equal(completion.tokens, whole[:limit])
    # Calls take 5 steps at most, or until the rest fits the next bucket.
    assert stats.active_rows == [4, 2, 2, 1, 1, 1, 1, 1]
    assert stats.num_row_steps == 4 * 4 + 2 * 8 + 22


def test_new_tokens_put_together_are_the_completions(engine, small, expected):
    for one in (engine, small):
        drawn, calls = {r.request_id: [] for r in REQUESTS}, []

        def take(request_id, tokens, drawn=drawn):
            drawn[request_id] += tokens

        def finish(completion, drawn=drawn):
            # All of it was there before.
            assert drawn[completion.request_id] == completion.tokens.tolist()

        one.run(
            REQUESTS,
            SEED,
            on_tokens=take,
            on_completion=finish,
            on_call=lambda *counts, calls=calls: calls.append(counts),
        )
        wanted = {i: one.tokens.tolist() for i, one in expected.items()}
        assert drawn == wanted
        assert calls[-1] == (len(REQUESTS), sum(map(len, wanted.values())))


def test_tokens_behind_a_stop_string_are_never_passed_on(engine):
    stopping = engines.engine_of(engine.pool, stop=("ZZ", "D"))
    drawn = {}

    def take(request_id, tokens):
        drawn.setdefault(request_id, []).extend(tokens)

    completions, _ = stopping.run(REQUESTS, SEED, on_tokens=take)
    assert any(c.finish_reason == "stop" for c in completions)
    for completion in completions:
        assert drawn[completion.request_id] == completion.tokens.tolist()


def test_a_run_that_its_listener_ends_leaves_the_engine_of_use(engine, expected):
    def stop(request_id, tokens):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        engine.run(REQUESTS, SEED, on_tokens=stop)
    completions, _ = engine.run(REQUESTS, SEED)
    assert_same(completions, expected)
