"""Groups of processes, here threads that share a channel; what a launcher says."""

import concurrent.futures
import functools
import queue
import threading
import types

import jax
import numpy as np
import pytest

from tests.runtime import linked_groups
from tlt_jax.runtime import channel, distributed

NUM = 3


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor() as made:
        yield made


@pytest.fixture
def groups():
    with linked_groups.of(NUM) as made:
        yield made


def all_do(pool, groups, action, order=(2, 0, 1)):
    """Let every process do this, begun in this order; return what came of it."""
    waiting = {i: pool.submit(action, groups[i]) for i in order}
    return [waiting[i].exception(20) or waiting[i].result() for i in range(NUM)]


def test_values_come_in_order_of_processes_whoever_comes_first(groups, pool):
    for number, order in enumerate([(2, 0, 1), (1, 2, 0), (0, 2, 1)]):

        def meet(group, number=number):
            return group.exchange("numbers", 10 * number + group.index)

        expected = [10 * number + i for i in range(NUM)]
        assert all_do(pool, groups, meet, order) == [expected] * NUM
    assert [group.is_first for group in groups] == [True, False, False]


def test_process_0_makes_what_all_get(groups, pool):
    made_by = []

    def ask(group):
        return group.first("thing", lambda: made_by.append(group.index) or [7])

    assert all_do(pool, groups, ask) == [[7]] * NUM
    assert made_by == [0]


def test_differences_are_seen_by_all_whoever_differs(groups, pool):
    def check(group, other):
        value = {"seed": 1} | ({"lr": 2} if group.index == other else {})
        return group.check_same("settings", value)

    assert all_do(pool, groups, lambda group: check(group, None)) == [None] * NUM
    for other in range(NUM):
        check_other = functools.partial(check, other=other)
        for error in all_do(pool, groups, check_other):
            assert type(error) is ValueError
            assert str(error) == (
                "the processes have different settings: start all of them with the "
                "same command line and files."
            )


def test_two_that_come_for_different_things_are_told(groups, pool):
    def meet(group):
        return group.exchange("weights" if group.index else "tokens", None)

    waiting = [pool.submit(meet, groups[i]) for i in (2, 0)]
    for waits in waiting:
        with pytest.raises(channel.ProcessError, match=" while others came to '"):
            waits.result(20)


def test_the_others_call_what_process_0_offers(groups):
    groups[0].offer("counter", types.SimpleNamespace(add=lambda a, b: (a, b)))
    assert groups[2].call("counter", "add", 3, 4) == (3, 4)


def test_what_is_large_goes_round_and_not_through_the_first(groups, pool):
    """By far the most of it from one, as of a drafter that it alone has trained."""
    arrays = [np.arange(n, dtype=np.float32) for n in (10, 300_000, 1000)]
    before = [group.traffic for group in groups]

    def share(group):
        return group.gather("drafter", {"of": group.index, "x": arrays[group.index]})

    for found in all_do(pool, groups, share):
        assert [one["of"] for one in found] == [0, 1, 2]
        for one, wanted in zip(found, arrays, strict=True):
            assert one["x"].dtype == np.float32 and np.array_equal(one["x"], wanted)
    for group, earlier in zip(groups, before, strict=True):
        carried = {n: b - earlier[n] for n, b in group.traffic.items()}
        assert carried["calls"] < 1000
        assert 300_000 * 4 < carried["values"] <= 2 * (301_010 * 4 + 1000)
    # One makes it, all have it.
    made = all_do(
        pool, groups, lambda g: g.first_large("x", lambda: np.ones(g.index + 1))
    )
    assert [one.tolist() for one in made] == [[1.0]] * NUM


def test_who_is_gone_while_values_travel_is_named(groups, pool, monkeypatch):
    monkeypatch.setattr(distributed, "_TOLD_S", 0.0)
    waiting = [
        pool.submit(groups[i].gather, "drafter", np.zeros(8_000_000)) for i in (0, 1)
    ]
    # It says how much it will send, and dies.
    groups[2].exchange("drafter", 100)
    groups[2]._link.close(failed=True)
    groups[2]._ring.close()
    for one in waiting:
        with pytest.raises(
            channel.ProcessError, match="process 2 has ended|ring of pro"
        ):
            one.result(20)


def test_an_error_is_explained_by_a_process_that_has_ended(groups, monkeypatch):
    monkeypatch.setattr(distributed, "_TOLD_S", 0.0)
    groups[1].explain(RuntimeError("of mine alone"))
    error = RuntimeError("Connection closed by peer")
    # Who leaves by an error says no goodbye.
    with pytest.raises(KeyError), groups[2]:
        raise KeyError("bug")
    with groups[0]._link._changed:
        groups[0]._link._changed.wait_for(lambda: groups[0]._link._broken, timeout=10)
    for group in groups[:2]:
        with pytest.raises(channel.ProcessError, match="^process 2 has ended") as found:
            group.explain(error)
        assert found.value.__cause__ is error


def test_who_leaves_in_good_order_is_not_missed(groups, pool):
    with groups[1], groups[2]:
        pass
    pool.submit(groups[0].__exit__, None, None, None).result(10)
    assert groups[0]._link._broken is None


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv(distributed.COORDINATOR, raising=False)
    distributed.initialize()
    with distributed.join() as group:
        assert group.is_first and group.num == 1
        assert group.exchange("anything", 7) == [7]
        assert group.first("anything", lambda: 8) == 8
        group.check_same("anything", 9)
        group.explain(RuntimeError())


def test_processes_that_cannot_join_say_so(monkeypatch):
    def fail(**_):
        raise RuntimeError("nobody answers")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(channel.ProcessError, match="could not be joined .nobody answ"):
        distributed.initialize(on_cluster=True)


def test_a_port_that_is_taken_is_said(monkeypatch):
    def fail(**_):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    for name, value in (("NUM_PROCESSES", "1"), ("PROCESS", "0")):
        monkeypatch.setenv(getattr(distributed, name), value)
    monkeypatch.setenv(distributed.COORDINATOR, "127.0.0.1:99")
    told = "^another program listens at 127.0.0.1:99: the same command takes another "
    with pytest.raises(channel.ProcessError, match=told):
        distributed.initialize()


@pytest.mark.parametrize(
    "said,expected",
    [
        (
            {"COORDINATOR": "127.0.0.1:99", "DEVICES": "4,5"},
            {
                "coordinator_address": "127.0.0.1:99",
                "coordinator_bind_address": "127.0.0.1:99",
                "local_device_ids": [4, 5],
            },
        ),
        (
            {"COORDINATOR": "host7:99", "DEVICES": ""},
            {"coordinator_address": "host7:99"},
        ),
    ],
)
def test_what_a_launcher_says_reaches_jax(monkeypatch, said, expected):
    given, config = {}, {}
    for name, value in (said | {"NUM_PROCESSES": "3", "PROCESS": "2"}).items():
        monkeypatch.setenv(getattr(distributed, name), value)
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(update=config.__setitem__),
        distributed=types.SimpleNamespace(initialize=lambda **kw: given.update(kw)),
    )
    monkeypatch.setattr(distributed, "jax", fake)
    distributed.initialize()
    assert given == expected | {
        "num_processes": 3,
        "process_id": 2,
        "shutdown_timeout_seconds": 30,
    }
    assert config == {
        "jax_cpu_collectives_implementation": "gloo",
        "jax_enable_preemption_service": False,
    }
    # On a cluster JAX finds out by itself.
    given.clear()
    distributed.initialize(on_cluster=True)
    assert given == {"shutdown_timeout_seconds": 30}


@pytest.mark.parametrize(
    "variables,expected",
    [
        ({"HOST": "10.0.0.7", "COORDINATOR": "localhost:1"}, "10.0.0.7"),
        ({"COORDINATOR": "localhost:1"}, "127.0.0.1"),
        ({"COORDINATOR": "host7:1"}, "10.9.8.7"),
        ({}, "10.9.8.7"),
    ],
)
def test_where_process_0_is_found(monkeypatch, variables, expected):
    for name in ("HOST", "COORDINATOR"):
        monkeypatch.delenv(getattr(distributed, name), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(getattr(distributed, name), value)
    found = types.SimpleNamespace(
        gethostname=lambda: "here", gethostbyname={"here": "10.9.8.7"}.get
    )
    monkeypatch.setattr(distributed, "socket", found)
    assert distributed._host() == expected


def test_address_and_secret_travel_through_a_collective(monkeypatch, pool):
    here, sent = threading.local(), queue.Queue()
    fake = types.SimpleNamespace(
        process_index=lambda: here.index, process_count=lambda: NUM
    )

    def broadcast(message):
        """As JAX's: an array of bytes for all, process 0's."""
        if here.index == 0:
            for _ in range(NUM - 1):
                sent.put(message.copy())
            return message
        return sent.get(timeout=10)

    monkeypatch.setattr(distributed, "jax", fake)
    monkeypatch.setattr(distributed, "_host", lambda: "127.0.0.1")
    multihost = types.SimpleNamespace(broadcast_one_to_all=broadcast)
    monkeypatch.setattr(distributed, "multihost_utils", multihost)

    def take_part(index):
        here.index = index
        with distributed.join() as group:
            assert (group.index, group.num) == (index, NUM)
            return group.exchange("name", f"process {index}")

    found = list(pool.map(take_part, range(NUM)))
    assert found == [[f"process {i}" for i in range(NUM)]] * NUM
