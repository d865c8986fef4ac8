"""Calls that are enqueued before the last is read change nothing but the waiting."""

import dataclasses
import time

import pytest

from tests.rl import engines
from tests.rl.engine.test_engine_speculation import EAGLE
from tlt_jax.rl.engine import decode_calls, request_queue, speculator
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.runtime import failures
from tlt_jax.specdec import strategy

# Texts that end by their token in the middle of a call, or at limits of their own; the
# third prompt is of three.
REQUESTS = engines.requests_of({6: (31, 17), 14: (24, 24, 9), 3: (34,), 9: (28, 30)})


def one_after_the_other(monkeypatch):
    """Enqueue nothing ahead."""
    monkeypatch.setattr(
        decode_calls.DecodeCalls, "enqueue_ahead", lambda calls, caches, *_: caches
    )


def told(engine, requests=REQUESTS, **options):
    """All that a run says, and the counts of its calls ahead."""
    said, begun = [], time.perf_counter()
    stats = engine.serve(
        request_queue.RequestQueue(requests).share(0),
        engines.SEED,
        on_completion=lambda c: said.append(
            (
                *(c.request_id, c.finish_reason, c.tokens.tolist()),
                *(c.logprobs.tolist(), c.was_drafted.tolist()),
            )
        ),
        on_call=said.append,
        on_tokens=lambda *drawn: said.append(drawn),
        **options,
    )
    # No second is counted of two calls.
    assert 0 < stats.decode_s <= time.perf_counter() - begun
    kept = {k: v for k, v in vars(stats).items() if not k.endswith("_s")}
    counts = kept.pop("num_ahead"), kept.pop("num_thrown_away")
    return (said, kept), counts


@pytest.fixture(scope="module")
def engine():
    """An engine whose calls take two steps."""
    engine = engines.engine_of(steps_per_call=2, page_size=2)
    engine.warm_up()
    yield engine
    engine.pool.close()


@pytest.fixture(scope="module")
def long(engine):
    """A request whose text takes seven calls and more."""
    completions, _ = engine.run(REQUESTS, engines.SEED)
    lengths = [len(c.tokens) for c in completions]
    assert max(lengths) > 14
    return REQUESTS[lengths.index(max(lengths))]


@pytest.mark.parametrize(
    "changes,counts,num_preempted",
    [
        (dict(), (7, 4), 0),
        # At times there are no pages for two calls of all rows, or not for one.
        (dict(num_pages=27), (3, 1), 2),
        (dict(max_rows=1), (29, 5), 0),
        # Where a text ends only the host knows.
        (dict(stop=("never",)), (0, 0), 0),
    ],
    ids="ample scarce one_row stop".split(),
)
def test_all_is_as_of_one_call_after_the_other(
    engine, monkeypatch, changes, counts, num_preempted
):
    is_other = "num_pages" in changes or "max_rows" in changes
    pool = None if is_other else engine.pool
    one = engines.engine_of(pool, steps_per_call=2, page_size=2, **changes)
    thrown, throw_away = [], decode_calls.DecodeCalls.throw_away

    def noted(calls, finished, stats):
        if finished and calls.has_ahead:
            thrown.append(int(calls._ahead.result.num_steps))
        throw_away(calls, finished, stats)

    monkeypatch.setattr(decode_calls.DecodeCalls, "throw_away", noted)
    found, ahead = told(one)
    # They would do no harm, but the device would have worked for nothing.
    assert thrown == [0] * counts[1]
    one_after_the_other(monkeypatch)
    expected, none = told(one)
    assert found == expected
    assert none == (0, 0)
    assert ahead == counts
    assert found[1]["num_preempted"] == num_preempted
    reasons = {item[1] for item in found[0] if isinstance(item, tuple) and item[2:]}
    assert reasons == {"eos", "length"}
    if is_other:
        one.pool.close()


def test_pages_of_finished_rows_are_read_as_they_were(monkeypatch):
    """What is read of them is enqueued behind the call that was thrown away."""
    engine = engine_lib.Engine(
        engines.CFG,
        dataclasses.replace(engines.BASE, steps_per_call=2, page_size=2),
        speculator_cfg=speculator.SpeculatorConfig(
            strategy.Arms(()), EAGLE, capture=True
        ),
    )
    engine.set_params(engines.PARAMS, version=0)

    def texts():
        found = []
        _, ahead = told(engine, on_text=found.append)
        return [(t.text_id, t.tokens.tolist(), t.hidden.tolist()) for t in found], ahead

    found, ahead = texts()
    assert ahead == (7, 4) and len(found) == len(REQUESTS)
    one_after_the_other(monkeypatch)
    assert texts() == (found, (0, 0))
    engine.pool.close()


def test_giving_up_while_a_call_is_ahead_leaves_the_engine_of_use(engine, long):
    expected, _ = told(engine)
    calls = []

    def give_up(num_tokens):
        calls.append(num_tokens)
        if len(calls) == 3:
            raise failures.Abandoned("enough")

    source = request_queue.RequestQueue([long]).share(0)
    with pytest.raises(failures.Abandoned, match="enough"):
        engine.serve(
            source, engines.SEED, on_completion=lambda c: None, on_call=give_up
        )
    assert calls == [2, 4, 6]
    assert told(engine)[0] == expected
    engine.release_cache()
    assert told(engine)[0] == expected


class Late(request_queue.Share):
    """A queue whose second request comes after some calls."""

    def __init__(self, requests):
        super().__init__(request_queue.RequestQueue(requests), 0)
        self.num_calls = 0

    @property
    def num_waiting(self):
        is_late = self.num_calls < 2 and self._queue.num_waiting == 1
        return 0 if is_late else super().num_waiting

    def take(self):
        return super().take() if self.num_waiting else None


def test_who_comes_late_waits_for_no_more_than_the_call_that_is_ahead(engine, long):
    source = Late([long, dataclasses.replace(REQUESTS[0], request_id=1)])

    def count(num_tokens):
        source.num_calls += 1

    stats = engine.serve(
        source, engines.SEED, on_completion=lambda c: None, on_call=count
    )
    assert stats.active_rows[:5] == [1, 1, 1, 2, 2]
