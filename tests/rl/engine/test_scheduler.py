"""The scheduler: pages are never shared by mistake, and everything finishes."""

import collections
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tlt_jax import types
from tlt_jax.models import kv_cache
from tlt_jax.rl.engine import request_queue, scheduler
from tlt_jax.specdec.tuners import tuner


def request(request_id, prompt_id=0, prompt=3, max_new_tokens=4):
    """Make a request whose prompt of `prompt` tokens is that of its `prompt_id`."""
    tokens = 100 * prompt_id + np.arange(prompt, dtype=np.int32)
    return types.Request(request_id, prompt_id, 0, tokens, max_new_tokens)


def plan_of(requests, **sizes):
    return scheduler.Scheduler(request_queue.RequestQueue(requests).share(0), **sizes)


def fewest_pages(r, page_size):
    """Pages that a request needs by itself: its text's, and its prompt's partial one.

    The last token drawn is never cached, nor is the prompt's last before its row.
    """
    cached = len(r.prompt) - 1
    return -(-(cached + r.max_new_tokens) // page_size) + (cached % page_size > 0)


class Device:
    """Cache contents by (page, slot), written and read as the engine would."""

    def __init__(self, page_size):
        self.page_size = page_size
        self.slots = {}
        self.num_prefilled = 0

    def write(self, pages, position, token):
        page = pages[position // self.page_size]
        assert page != kv_cache.SCRATCH_PAGE
        self.slots[page, position % self.page_size] = (position, token)

    def text(self, row):
        return [
            self.slots[row.pages[i // self.page_size], i % self.page_size]
            for i in range(row.length)
        ]

    def apply(self, admission):
        for job in (*admission.prompts, *admission.returns):
            assert job.start % self.page_size == 0
            for position in range(job.start, len(job.text)):
                self.write(job.pages, position, int(job.text[position]))
                self.num_prefilled += 1
        for source, target in admission.copies:
            for slot in range(self.page_size):
                if (source, slot) in self.slots:
                    self.slots[target, slot] = self.slots[source, slot]


def check_pages(plan, num_pages, page_size):
    """Pages are held by the rows and prompts that the counts say, and by nobody twice.

    Only full pages of one prompt may be listed by several.
    """
    holders = collections.Counter()
    writable = []
    for row in plan.rows:
        assert len(set(row.pages)) == len(row.pages)
        holders.update(row.pages)
        writable += row.pages[(len(row.request.prompt) - 1) // page_size :]
    assert len(set(writable)) == len(writable)
    assert all(holders[page] == 1 for page in writable)
    for pages in plan._prompts.values():
        holders.update(pages)
    assert kv_cache.SCRATCH_PAGE not in holders
    assert plan._pool.num_free == num_pages - 1 - len(holders)
    for page in range(num_pages):
        assert plan._pool._references[page] == holders[page]
    waiting = {row.request.prompt_id for row in plan.waiting}
    assert all(p in waiting or plan._source.waits(p) for p in plan._prompts)


def sampled(request_id, index):
    """The token that a request draws at an index of its completion."""
    return 1000 * request_id + index


def never(call):
    """No call is enqueued before the last is read."""
    return False


def run(
    plan, *, num_pages, page_size, num_steps, max_rows, draw_count, goes_ahead=never
):
    """Run all requests to their ends as the engine does, checking at every step."""
    device = Device(page_size)
    finished = {}
    for call in range(10_000):
        if not (plan.num_waiting or plan.rows):
            break
        device.apply(plan.admit(num_steps))
        for row in plan.rows:
            end = row.length + min(num_steps, row.remaining)
            assert len(row.pages) == -(-end // page_size)
        if goes_ahead(call):
            num_rows, held = len(plan.rows), [list(row.pages) for row in plan.rows]
            went = plan.reserve_ahead(2 * num_steps)
            for row, pages in zip(plan.rows, held, strict=True):
                end = row.length + min(2 * num_steps, row.remaining)
                assert row.pages[: len(pages)] == pages
                assert len(row.pages) == (-(-end // page_size) if went else len(pages))
            assert len(plan.rows) == num_rows
        check_pages(plan, num_pages, page_size)
        assert 1 <= len(plan.rows) <= max_rows
        for row in list(plan.rows):
            for _ in range(min(draw_count(call, row), num_steps, row.remaining)):
                device.write(row.pages, row.length, row.pending)
                row.tokens.append(sampled(row.request.request_id, len(row.tokens)))
                row.length += 1
            text = row.text()[:-1].tolist()
            assert device.text(row) == list(enumerate(text))
            if not row.remaining:
                plan.finish(row)
                finished[row.request.request_id] = row.tokens
    else:
        raise AssertionError("no end after 10,000 calls")
    assert plan._pool.num_free == num_pages - 1
    return finished, device


@st.composite
def situations(draw):
    page_size = draw(st.sampled_from([1, 2, 3, 8]))
    prompts = draw(st.lists(st.integers(1, 17), min_size=1, max_size=4))
    chosen = st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 12))
    requests = [
        request(10 + i, prompt_id, prompts[prompt_id], max_new_tokens)
        for i, (prompt_id, max_new_tokens) in enumerate(
            draw(st.lists(chosen, min_size=1, max_size=9))
        )
    ]
    fewest = max(fewest_pages(r, page_size) for r in requests)
    return dict(
        requests=requests,
        page_size=page_size,
        num_pages=1 + fewest + draw(st.integers(0, 8)),
        max_rows=draw(st.integers(1, 5)),
        num_steps=draw(st.sampled_from([1, 3, 32])),
        pace_seed=draw(st.integers(0, 99)),
    )


@hypothesis.given(situations())
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
def test_all_finish_with_their_own_pages_however_few_there_are(situation):
    requests, pace = situation["requests"], random.Random(situation["pace_seed"])
    sizes = {k: situation[k] for k in ("num_pages", "page_size", "max_rows")}
    plan = plan_of(requests, **sizes)
    finished, _ = run(
        plan,
        **sizes,
        num_steps=situation["num_steps"],
        draw_count=lambda call, row: pace.randint(0, 4),
        goes_ahead=lambda call: pace.random() < 0.5,
    )
    assert finished == {
        r.request_id: [sampled(r.request_id, i) for i in range(r.max_new_tokens)]
        for r in requests
    }


def test_a_groups_prompt_is_computed_once_and_its_full_pages_are_shared():
    group = [request(i, prompt=10, max_new_tokens=3) for i in range(4)]
    plan = plan_of(group, num_pages=20, page_size=4, max_rows=4)
    admission = plan.admit(2)
    # 9 positions are cached: two pages for all, and part of a third for each.
    (prefill,) = admission.prompts
    np.testing.assert_array_equal(prefill.text, np.arange(9))
    assert (prefill.start, len(prefill.pages)) == (0, 3)
    assert admission.returns == []
    shared = list(prefill.pages[:2])
    own = [row.pages[2:] for row in plan.rows]
    assert [row.pages[:2] for row in plan.rows] == [shared] * 4
    assert admission.copies == [(prefill.pages[2], pages[0]) for pages in own]
    assert [len(pages) for pages in own] == [1] * 4
    # Nobody is left who could join: the prompt's partial page is free again.
    assert plan._pool.num_free == 19 - 2 - 4
    for row in list(plan.rows):
        assert plan._pool.num_free < 19
        plan.finish(row)
    assert plan._pool.num_free == 19


def test_a_prompt_stays_while_rows_may_still_join():
    group = [request(i, prompt=9, max_new_tokens=2) for i in range(3)]
    plan = plan_of(group, num_pages=9, page_size=4, max_rows=1)
    assert len(plan.admit(2).prompts) == 1
    for _ in range(2):
        plan.finish(plan.rows[0])
        assert not plan.admit(2).any()  # full pages alone: nothing to do at all
    assert plan._prompts == {}
    plan.finish(plan.rows[0])
    assert plan._pool.num_free == 8


def test_a_preempted_row_comes_back_with_what_it_had_drawn():
    sizes = dict(num_pages=8, page_size=2, max_rows=2)
    requests = [request(i, i, prompt=2, max_new_tokens=8) for i in range(2)]
    plan = plan_of(requests, **sizes)
    finished, device = run(plan, **sizes, num_steps=1, draw_count=lambda call, row: 1)
    assert {len(tokens) for tokens in finished.values()} == {8}
    # Two rows of three pages and a prompt page fill the seven; then the second waits
    # for the first to end, and its prompt and its tokens but the last are cached anew.
    assert plan.num_preempted == 1
    assert device.num_prefilled == 2 + 7


def test_the_row_admitted_first_goes_on_at_the_cost_of_all_others():
    requests = [request(0, 0, prompt=1, max_new_tokens=8)]
    requests += [request(i, 1, prompt=5, max_new_tokens=3) for i in (1, 2)]
    plan = plan_of(requests, num_pages=5, page_size=2, max_rows=2)
    rows, held = [], []
    for _ in range(8):
        plan.admit(1)
        rows.append([row.request.request_id for row in plan.rows])
        held.append(list(plan._prompts))
        for row in list(plan.rows):
            row.tokens.append(7)
            row.length += 1
    # Of four pages the row takes its second from the row beside it, and its third from
    # the prompt that two more wait for.
    assert rows == [[0, 1]] * 2 + [[0]] * 6
    assert held == [[1]] * 4 + [[]] * 4
    assert plan.num_preempted == 1
    assert [row.request.request_id for row in plan.waiting] == [1]
    assert [row.tokens for row in plan.waiting] == [[7, 7]]
    assert plan.num_waiting == 2


def test_a_row_that_is_put_back_stands_before_those_that_never_ran():
    requests = [request(i, i, prompt=1, max_new_tokens=8) for i in range(2)]
    requests.append(request(2, 2, prompt=9, max_new_tokens=1))
    plan = plan_of(requests, num_pages=5, page_size=2, max_rows=3)
    for _ in range(5):
        plan.admit(1)
        for row in plan.rows:
            row.tokens.append(7)
            row.length += 1
    assert [row.request.request_id for row in plan.rows] == [0]
    assert [row.request.request_id for row in plan.waiting] == [1, 2]


def test_rows_wait_until_there_are_pages_for_a_whole_call():
    requests = [request(i, i, prompt=1, max_new_tokens=8) for i in range(2)]
    plan = plan_of(requests, num_pages=6, page_size=2, max_rows=2)
    plan.admit(4)
    assert len(plan.rows) == 2
    plan = plan_of(requests, num_pages=6, page_size=2, max_rows=2)
    plan.admit(8)
    assert [row.request.request_id for row in plan.rows] == [0]
    assert plan.num_preempted == 0


def test_pages_are_reserved_ahead_where_nobody_is_put_back_for_them():
    requests = [request(i, i, prompt=1, max_new_tokens=8) for i in range(2)]
    plan = plan_of(requests, num_pages=8, page_size=2, max_rows=2)
    plan.admit(3)
    first, second = (list(row.pages) for row in plan.rows)
    assert (len(first), len(second), plan._pool.num_free) == (2, 2, 3)
    assert not plan.reserve_ahead(8)  # one page too few for both
    assert [row.pages for row in plan.rows] == [first, second]
    assert plan.reserve_ahead(6)
    assert [row.pages[:2] for row in plan.rows] == [first, second]
    assert [len(row.pages) for row in plan.rows] == [3, 3]
    # The first one ended, so that the call did not take place: all is as without it.
    plan.finish(plan.rows[0])
    plan.admit(3)
    assert [row.pages for row in plan.rows] == [second]
    assert plan._pool.num_free == 5 and plan.num_preempted == 0


def test_page_table_lists_pages_in_order_and_scratch_elsewhere():
    requests = [request(i, i, prompt=3, max_new_tokens=4) for i in range(2)]
    plan = plan_of(requests, num_pages=9, page_size=2, max_rows=2)
    plan.admit(4)
    table = plan.page_table(plan.rows, 4, 5)
    assert table.dtype == np.int32
    for i, row in enumerate(plan.rows):
        assert table[i].tolist() == row.pages + [0] * (5 - len(row.pages))
    assert not table[2:].any()


def test_pages_are_free_again_only_when_nobody_holds_them():
    pool = scheduler.PagePool(4)
    assert pool.take(4) is None and pool.num_free == 3
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.num_free == 2
    pool.release(pages[:1])
    assert pool.num_free == 3
    assert sorted(pool.take(3)) == [1, 2, 3]


@pytest.mark.parametrize(
    "prompt,max_new_tokens,needed",
    [(1, 4, 1), (1, 5, 2), (5, 4, 2), (5, 5, 3), (4, 1, 2), (3, 3, 3)],
)
def test_a_request_that_can_never_fit_is_refused(prompt, max_new_tokens, needed):
    sizes = dict(page_size=4, max_rows=1)
    r = request(7, prompt=prompt, max_new_tokens=max_new_tokens)
    assert fewest_pages(r, 4) == needed
    with pytest.raises(ValueError, match="request 7 .* raise cache.num_pages"):
        scheduler.check_fits(r, num_pages=needed, page_size=4)
    scheduler.check_fits(r, num_pages=needed + 1, page_size=4)
    plan = plan_of([r], num_pages=needed + 1, **sizes)
    run(
        plan,
        num_pages=needed + 1,
        num_steps=max_new_tokens,
        draw_count=lambda call, row: 3,
        **sizes,
    )


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="request 5 has an empty prompt"):
        scheduler.check_fits(request(5, prompt=0), num_pages=9, page_size=4)


@pytest.mark.parametrize(
    "max_rows,expected",
    [
        *((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6])),
        *((8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])),
    ],
)
def test_buckets_hold_every_number_of_rows(max_rows, expected):
    assert scheduler.buckets(max_rows) == expected
    for count in range(1, max_rows + 1):
        smallest = min(bucket for bucket in expected if bucket >= count)
        assert tuner.bucket_of(count, max_rows) == smallest


@pytest.mark.parametrize(
    "num_rows,num_waiting,max_rows,expected",
    [
        (64, 5, 64, 8),  # an eighth
        (7, 1, 8, 1),
        (64, 0, 64, 32),  # the rest fits the next bucket
        (33, 0, 64, 1),
        (5, 0, 6, 1),
        (6, 0, 6, 2),
        (1, 0, 64, 1),
        (1, 0, 1, 1),
    ],
)
def test_finish_quota(num_rows, num_waiting, max_rows, expected):
    assert scheduler.finish_quota(num_rows, num_waiting, max_rows) == expected
