"""The shared queue: every request is generated once, by whoever has room."""

import random
import threading

import numpy as np

from tlt_jax import types
from tlt_jax.rl.engine import request_queue


def request(request_id, prompt_id=0):
    return types.Request(request_id, prompt_id, 0, np.ones(2, np.int32), 4)


def ids(requests):
    return [None if r is None else r.request_id for r in requests]


def test_in_order_starts_the_longest_first():
    requests = [request(i, prompt_id) for i, prompt_id in enumerate([0, 1, 2, 1, 3])]

    def order(expected):
        return [r.request_id for r in request_queue.in_order(requests, expected)]

    assert order({}) == [0, 1, 2, 3, 4]
    assert order({0: 10.0, 1: 30.0, 2: 20.0, 3: 40.0}) == [4, 1, 3, 2, 0]
    # Prompts 0 and 3 have no history: they count as the mean of 50, 50 and 5.
    assert order({1: 50.0, 2: 5.0}) == [1, 3, 0, 4, 2]
    assert order({0: 9.0, 77: 1e9}) == [0, 1, 2, 3, 4]


def test_a_worker_gets_no_more_than_an_equal_part():
    queue = request_queue.RequestQueue([request(i, i) for i in range(5)], num_workers=2)
    assert ids(queue.take(0) for _ in range(4)) == [0, 1, 2, None]
    assert ids(queue.take(1) for _ in range(4)) == [3, 4, None, None]
    assert queue.num_waiting == 0
    # What is left is shared anew when somebody is through.
    queue = request_queue.RequestQueue([request(i, i) for i in range(9)], num_workers=2)
    first = [queue.take(0) for _ in range(2)]
    assert ids(queue.take(1) for _ in range(9)) == [2, 3, 4, 5, 6] + [None] * 4
    assert queue.finish(0, first[0].request_id)
    assert ids(queue.take(0) for _ in range(9)) == [7, 8] + [None] * 7


def test_groups_stay_together_and_spread_over_workers():
    requests = [request(4 * p + i, p) for p in range(3) for i in range(4)]
    queue = request_queue.RequestQueue(requests, num_workers=2)
    taken = [], []
    for _ in range(6):
        for worker in (0, 1):
            taken[worker].append(queue.take(worker))
    assert [r.prompt_id for r in taken[0]] == [0] * 4 + [2] * 2
    assert [r.prompt_id for r in taken[1]] == [1] * 4 + [2] * 2


def test_a_lost_workers_requests_are_generated_by_others():
    queue = request_queue.RequestQueue(
        [request(i, i // 2) for i in range(6)], num_workers=2
    )
    mine = [queue.take(1) for _ in range(3)]
    assert queue.finish(1, mine[0].request_id)
    assert ids(queue.lose(1)) == ids(mine[1:])
    # It finishes nothing any more, and gets nothing.
    assert not queue.finish(1, mine[1].request_id) and queue.take(1) is None
    rest = ids(queue.take(0) for _ in range(6))
    assert sorted(rest[:5]) == [1, 2, 3, 4, 5] and rest[5] is None
    assert rest[:2] == ids(mine[1:])
    assert not queue.waits(0) and not queue.waits(2)


def test_threads_generate_everything_once():
    requests = [request(i, i // 5) for i in range(200)]
    queue = request_queue.RequestQueue(requests, num_workers=4)
    finished, lost = [], threading.Event()

    def work(number):
        share, held = queue.share(number), []
        pace = random.Random(number)
        while True:
            while len(held) < 7 and (taken := share.take()) is not None:
                held.append(taken)
            if number == 3 and len(finished) > 40:
                queue.lose(3)
                lost.set()
            if not held:
                # Another's requests may yet come back.
                if lost.is_set() or number == 3:
                    if share.num_waiting == 0 or number == 3:
                        return
                continue
            done = held.pop(pace.randrange(len(held)))
            if share.finish(done.request_id):
                finished.append(done.request_id)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(finished) == list(range(200))
