"""Rollouts by workers of several processes, here threads that share a channel."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest

from tests.runtime import linked_groups
from tlt_jax import types
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.workers import coordinator, records, workers
from tlt_jax.runtime import channel, failures, programs

NUM = 3
REQUESTS = [
    types.Request(i, i // 4, i % 4, np.arange(3, dtype=np.int32), 8) for i in range(24)
]


class FakeEngine:
    """Takes two requests at a time; the tokens are a function of the request."""

    version = drafter_version = 0

    def __init__(self, name, fails=None):
        self.name, self._fails = name, fails
        self.pool = threading.Event()  # Something to be closed.
        self.pool.close = self.pool.set
        self.pool.stats = programs.PoolStats()

    def check(self, requests):
        assert requests

    def serve(self, source, seed, *, on_completion, on_call, on_text, capture_frac):
        stats, held = rollout_stats.RolloutStats(), []
        while True:
            while len(held) < 2 and (request := source.take()) is not None:
                source.waits(request.prompt_id)
                held.append(request)
            if not held:
                return stats
            if self._fails is not None:
                raise self._fails
            time.sleep(0.01)
            request = held.pop(0)
            tokens = np.arange(request.request_id % 5 + seed, dtype=np.int32)
            if source.finish(request.request_id):
                stats.num_tokens += len(tokens)
                zeros = np.zeros(len(tokens), np.float32)
                on_completion(
                    types.Completion(request.request_id, tokens, zeros, "eos")
                )
            on_call(stats.num_tokens)


@pytest.fixture
def groups():
    with linked_groups.of(NUM) as made:
        yield made


def teams_of(groups, engines_each=2, failing=None):
    failing = failing or {}
    return [
        workers.Workers(
            [
                FakeEngine(n, failing.get(n))
                for n in range(i * engines_each, (i + 1) * engines_each)
            ],
            records.Config(min_idle=1),
            group,
        )
        for i, group in enumerate(groups)
    ]


def run_all(teams, seed=1):
    """Run a rollout in all processes; return what each gets, and who judged what."""
    judged = [[] for _ in teams]
    with concurrent.futures.ThreadPoolExecutor(len(teams)) as pool:
        running = [
            pool.submit(
                team.run,
                REQUESTS,
                seed,
                expected_lengths={},
                on_completion=mine.append,
                on_call=lambda *_: None,
            )
            for team, mine in zip(teams, judged, strict=True)
        ]
        return [one.result(20) for one in running], judged


def read(completions):
    return [(c.request_id, c.tokens.tolist()) for c in completions]


def test_all_processes_get_the_whole_rollout(groups):
    teams = teams_of(groups)
    expected = [(i, list(range(i % 5 + 1))) for i in range(24)]
    for _ in range(3):
        results, judged = run_all(teams)
        for completions, stats in results:
            assert read(completions) == expected
            assert stats.num_tokens == sum(len(tokens) for _, tokens in expected)
        # Each completion is judged once, where it was generated.
        ids = [c.request_id for mine in judged for c in mine]
        assert sorted(ids) == list(range(24))
        assert all(judged)
    spans = teams[0].coordination.timeline()
    assert {i.worker for i in spans} == set(range(6))
    assert [teams[1].first, teams[2].num] == [2, 6]
    intervals = [team.coordination.state.intervals for team in teams[:2]]
    assert intervals[0] == intervals[1] != ()


def test_a_worker_of_another_process_that_fails_is_replaced(groups):
    teams = teams_of(groups, failing={3: MemoryError("no room")})
    results, _ = run_all(teams)
    assert all(len(completions) == 24 for completions, _ in results)
    assert teams[0].lost == {3: "MemoryError: no room"}
    # It is left out from now on, and its process takes part all the same.
    results, judged = run_all(teams)
    assert all(len(completions) == 24 for completions, _ in results)
    assert {i.worker for i in teams[0].coordination.timeline()} == {0, 1, 2, 4, 5}


def test_without_a_worker_all_processes_stop(groups):
    errors = {n: OSError(f"gone {n}") for n in range(3)}
    teams = teams_of(groups, engines_each=1, failing=errors)
    with concurrent.futures.ThreadPoolExecutor(NUM) as pool:
        running = [pool.submit(team.run, REQUESTS, 5) for team in teams]
        for one in running:
            with pytest.raises(failures.TrainingError, match="no worker is left: work"):
                one.result(20)


def test_a_process_that_ends_stops_the_others(groups):
    teams = teams_of(groups, engines_each=1)
    begun = threading.Event()

    def hang(*_, **__):
        begun.set()
        threading.Event().wait(5)
        raise OSError("too late")

    for team in teams:
        team.engines[0].serve = hang
    with concurrent.futures.ThreadPoolExecutor(NUM) as pool:
        running = [pool.submit(team.run, REQUESTS, 5) for team in teams[:2]]
        assert begun.wait(10)
        groups[2].__exit__(ValueError, None, None)
        for one in running:
            with pytest.raises(channel.ProcessError, match="process 2 has ended"):
                one.result(4)


def test_requests_of_an_earlier_rollout_count_no_more(groups):
    home, guest = (
        workers.Workers([FakeEngine(0)], None, group).home for group in groups[:2]
    )
    requests = REQUESTS[:4]
    queue = request_queue.RequestQueue(requests, num_workers=2)
    first = home.begin(queue, [0, 1], [0, 1])
    assert guest.begin(requests) == first
    share = guest.share(first, 1)
    taken = share.take()
    assert taken is requests[0] and share.waits(0) and share.num_waiting == 3
    again = request_queue.RequestQueue(requests, num_workers=2)
    home.begin(again, [0, 1], [0, 1])
    assert not share.finish(taken.request_id)
    assert share.take() is None and share.num_waiting == 0
    assert again.num_left == 4


def eventually(holds, timeout_s):
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        if holds():
            return True
        time.sleep(0.001)
    return False


def test_a_trainer_that_asks_all_the_time_is_no_burden(groups, monkeypatch):
    """Process 0 decodes while another trains: it is asked a handful of times."""
    teams = teams_of(groups, engines_each=1)
    shared, remote = teams[0].coordination, teams[1].coordination
    asked, call = [], groups[1].call
    monkeypatch.setattr(
        groups[1], "call", lambda *args: asked.append(args) or call(*args)
    )
    queue = request_queue.RequestQueue(REQUESTS, num_workers=3)
    teams[0].home.begin(queue, [0, 1], [0, 1])
    remote.send(records.WorkerDone(1, 1, 0))
    assert remote.next_training(1).training == 1
    asked.clear()
    assert not any(remote.should_stop(1) for _ in range(1000))
    assert len(asked) <= 2
    shared.send(records.WorkerDone(1, 0, 0))
    assert eventually(lambda: remote.should_stop(1), 0.5)
    assert remote.next_command(1) is not None
    remote.send(records.TrainingStopped(1))
    # The next training is another one; what is over is told at once.
    teams[0].home.begin(queue, [0, 1], [0, 1])
    remote.send(records.WorkerDone(2, 1, 0))
    assert remote.next_training(1).training == 2
    assert not remote.should_stop(2)
    remote.send(records.TrainingStopped(2))
    assert eventually(lambda: remote.should_stop(2), 2.0)
    assert remote.should_stop(1)


def test_the_trainer_of_another_process_hears_its_commands(groups):
    teams = teams_of(groups, engines_each=1)
    shared, remote = teams[0].coordination, teams[1].coordination
    queue = request_queue.RequestQueue(REQUESTS, num_workers=3)
    teams[0].home.begin(queue, [0, 1, 2], [0, 1, 2])
    assert remote.next_command(1) == records.Generate(1, 1, 0)
    remote.send(records.WorkerDone(1, 1, 0))
    assert remote.next_training(1) == records.Train(1, 0, (1,))
    assert remote.next_training(0) is None
    assert not remote.should_stop(1) and remote.may_publish(1)
    shared.send(records.WorkerDone(1, 0, 0))
    shared.send(records.WorkerDone(1, 2, 0))
    assert eventually(lambda: remote.should_stop(1), 0.5)
    remote.send(records.TrainingStopped(1))
    assert not remote.may_publish(1)
    assert coordinator.sums(shared.timeline())["workers/idle_s"] > 0
    # Without process 0 there is nothing to do.
    groups[0].__exit__(ValueError, None, None)
    assert remote.next_training(1) is None and remote.should_stop(2)
    assert remote.closed
