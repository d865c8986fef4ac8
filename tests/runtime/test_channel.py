import concurrent.futures
import os
import pickle
import socket
import threading
import time
from multiprocessing import connection

import numpy as np
import pytest

from tlt_jax.runtime import channel
from tlt_jax.runtime.transport import links as links_lib

SECRET = b"a secret"


@pytest.fixture
def server():
    made = channel.Server(3, "127.0.0.1", SECRET)
    yield made
    made.close(failed=True)


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor() as made:
        yield made


def clients(server):
    return [channel.Client(i, server.address, SECRET) for i in (1, 2)]


class Counter:
    def __init__(self):
        self.count, self.closed = 0, threading.Event()

    def add(self, amount):
        self.count += amount
        return self.count

    def wait(self):
        self.closed.wait(10)

    def fail(self):
        raise KeyError("no such thing")

    def close(self):
        self.closed.set()


def test_all_get_what_all_bring(server, pool):
    links = [server, *clients(server)]
    for number in (1, 2):
        waiting = [
            pool.submit(link.meet, number, "greeting", i, {"from": i * number})
            for i, link in enumerate(links)
        ]
        for found in waiting:
            assert found.result(10) == [{"from": i * number} for i in range(3)]
    for link in links[1:]:
        link.close()
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 5


def test_a_meeting_waits_for_the_last(server, pool):
    one, two = clients(server)
    waiting = [
        pool.submit(server.meet, 1, "a", 0, 0),
        pool.submit(one.meet, 1, "a", 1, 1),
    ]
    _, not_done = concurrent.futures.wait(waiting, timeout=0.1)
    assert len(not_done) == 2
    two.meet(1, "a", 2, 2)
    assert waiting[0].result(10) == [0, 1, 2]


def test_offered_objects_are_called(server, pool):
    one, two = clients(server)
    # Asked for before it is there.
    first = pool.submit(one.call, "counter", "add", 1)
    time.sleep(0.05)
    counter = Counter()
    server.offer("counter", counter)
    assert first.result(10) == 1
    # One that waits holds up nobody.
    waits = pool.submit(one.call, "counter", "wait")
    assert one.call("counter", "add", 2) == 3 and two.call("counter", "add", 3) == 6
    with pytest.raises(KeyError, match="no such thing"):
        two.call("counter", "fail")
    assert two.call("counter", "add", 0) == 6
    counter.close()
    waits.result(10)


def test_who_leaves_without_goodbye_breaks_it(server, pool):
    one, two = clients(server)
    counter = Counter()
    server.offer("counter", counter)
    waiting = [
        pool.submit(server.meet, 1, "a", 0, 0),
        pool.submit(two.meet, 1, "a", 2, 2),
    ]
    time.sleep(0.05)
    one.close(failed=True)
    for found in waiting:
        with pytest.raises(channel.ProcessError, match="process 1 has ended. The same"):
            found.result(10)
    assert counter.closed.wait(10)
    with pytest.raises(channel.ProcessError, match="process 1"):
        server.check()


def test_who_is_silent_is_given_up(pool, monkeypatch):
    server = channel.Server(3, "127.0.0.1", SECRET, silent_s=0.5)
    monkeypatch.setattr(channel, "_BEAT_S", 0.1)
    one = channel.Client(1, server.address, SECRET)
    monkeypatch.setattr(channel.Client, "_beat", lambda self: None)
    two = channel.Client(2, server.address, SECRET)
    with pytest.raises(channel.ProcessError, match="process 2 was silent for 0.5 s"):
        server.meet(1, "a", 0, 0)
    for link in (one, two, server):
        link.close(failed=True)


def test_who_cannot_leave_by_itself_is_told(monkeypatch):
    """It may wait for an array that nobody will send."""
    monkeypatch.setattr(channel, "_LEAVE_S", 0.3)
    told = [[], [], []]
    server = channel.Server(3, "127.0.0.1", SECRET, on_gone=told[0].append)
    one, two = (
        channel.Client(i, server.address, SECRET, told[i].append) for i in (1, 2)
    )
    server.offer("counter", Counter())
    one.call("counter", "add", 1)
    two.close(failed=True)
    until = time.monotonic() + 10
    while not (told[0] and told[1]) and time.monotonic() < until:
        time.sleep(0.01)
    reason = "process 2 has ended. The same command resumes from the newest checkpoint."
    assert told == [[reason], [reason], []]
    one.close(failed=True)
    server.close(failed=True)


def test_who_leaves_in_time_is_left_alone(monkeypatch):
    monkeypatch.setattr(channel, "_LEAVE_S", 0.2)
    told = []
    server = channel.Server(2, "127.0.0.1", SECRET, on_gone=told.append)
    one = channel.Client(1, server.address, SECRET, told.append)
    server.close(failed=True)
    one.close(failed=True)
    time.sleep(0.4)
    assert told == []


def test_the_end_of_process_0_is_told(server, pool):
    one, _ = clients(server)
    address = server.address
    waiting = pool.submit(one.meet, 1, "a", 1, 1)
    time.sleep(0.05)
    server.close(failed=True)
    with pytest.raises(channel.ProcessError, match="process 0 has"):
        waiting.result(10)
    with pytest.raises(channel.ProcessError, match="process 0"):
        channel.Client(2, address, SECRET).meet(1, "a", 2, 2)


def test_processes_that_diverge_are_told(server, pool):
    one, _ = clients(server)
    waiting = pool.submit(server.meet, 1, "rewards", 0, 0)
    time.sleep(0.05)
    with pytest.raises(channel.ProcessError, match="process 1 came to 'weights' while"):
        one.meet(1, "weights", 1, 1)
    with pytest.raises(channel.ProcessError, match="same settings"):
        waiting.result(10)


def test_strangers_are_not_heard(server, pool):
    with pytest.raises(connection.AuthenticationError):
        connection.Client(server.address, authkey=os.urandom(8))
    one, two = clients(server)
    waiting = [
        pool.submit(link.meet, 1, "a", i, i)
        for i, link in enumerate((server, one, two))
    ]
    assert waiting[0].result(10) == [0, 1, 2]


def test_the_last_comer_with_another_topic_is_refused(server, pool):
    """It completes the number of those who have come; nobody gets its value."""
    one, two = clients(server)
    waiting = [
        pool.submit(server.meet, 1, "rewards", 0, 0),
        pool.submit(one.meet, 1, "rewards", 1, 1),
    ]
    concurrent.futures.wait(waiting, timeout=0.1)
    with pytest.raises(channel.ProcessError, match="process 2 came to 'weights' while"):
        two.meet(1, "weights", 2, 2)
    for found in waiting:
        with pytest.raises(channel.ProcessError, match="process 2 came to 'weights'"):
            found.result(10)


def silent(address):
    return socket.create_connection(address, timeout=10)


def test_who_says_nothing_holds_up_nobody(server, pool, monkeypatch):
    strangers = [silent(server.address) for _ in range(20)]
    started = time.monotonic()
    one, two = clients(server)
    links = enumerate((server, one, two))
    waiting = [pool.submit(link.meet, 1, "a", i, i) for i, link in links]
    assert waiting[0].result(10) == [0, 1, 2]
    assert time.monotonic() - started < 5
    # Nor does it stay for ever, not even where it says something now and then.
    monkeypatch.setattr(links_lib, "_HANDSHAKE_S", 0.3)
    quiet, slow = silent(server.address), silent(server.address)
    # An answer of 200 bytes, a byte at a time.
    slow.send(b"\0\0\0\xc8")
    started = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - started < 5:
            slow.send(b"a")
            time.sleep(0.05)
    quiet.settimeout(5)
    while quiet.recv(100):
        pass
    assert time.monotonic() - started < 4
    for link in (quiet, slow, *strangers):
        link.close()


@pytest.mark.parametrize(
    "greeting",
    [b"[0, true]", b"[3, true]", b"[true, true]", b"{}", b"\x80", b"9" * 5000],
)
def test_a_greeting_that_names_no_process_is_hung_up_on(server, greeting):
    link = connection.Client(server.address, authkey=SECRET)
    link.send_bytes(greeting)
    with pytest.raises((EOFError, OSError)):
        link.recv_bytes()
    link.close()
    server.check()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_nothing_is_made_of_a_message_but_what_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = clients(server)
    with pytest.raises(
        channel.ProcessError, match="holds (posix|os).mkdir, which none"
    ):
        one.meet(1, "a", 1, Harmful())
    assert not os.listdir(tmp_path)
    for method in ("_break", "close", "offer", "__init__"):
        with pytest.raises(channel.ProcessError, match="is not called by other proces"):
            two.call(None, method, "x")
    counter = Counter()
    server.offer("counter", counter)
    assert two.call("counter", "add", 3) == 3


def test_arrays_have_another_way(server, pool):
    """What goes through process 0 is small, or it would carry it for all."""
    one, _ = clients(server)
    with pytest.raises(channel.ProcessError, match="holds numpy.*, which none"):
        one.meet(1, "a", 1, np.zeros(3))
    with pytest.raises(ValueError, match="too large for the channel, which takes 1677"):
        one.call("counter", "add", "x" * (1 << 24))
    # What numbers records have, is none.
    assert channel.loads(pickle.dumps(np.float64(2.5))) == 2.5


def test_what_is_said_is_counted(server):
    one, two = clients(server)
    server.offer("counter", Counter())
    one.call("counter", "add", 1)
    assert 20 < one.traffic.sent_bytes < 100 and one.traffic.received_bytes < 50
    assert one.traffic.num_bytes == server.traffic.num_bytes
    assert one.traffic.sent_bytes == server.traffic.received_bytes
    assert two.traffic.num_bytes == 0


def test_who_has_heard_finds_it_counted():
    """Else what an answer's receiver reads would hang on the sender's thread."""
    traffic, counted = links_lib.Traffic(), []

    class Link:
        def send_bytes(self, message):
            counted.append((len(message), traffic.sent_bytes))

    channel._send(Link(), [1, 2], traffic)
    channel._send(Link(), "three", traffic)
    (first, after_first), (second, after_second) = counted
    assert 0 < first == after_first and first + second == after_second


def test_who_asks_is_told_of_a_break_at_once(server):
    one, two = clients(server)
    heard = [threading.Event(), threading.Event()]
    server.when_broken(heard[0].set)
    one.when_broken(heard[1].set)
    assert not heard[0].wait(0.05)
    two.close(failed=True)
    assert heard[0].wait(5) and heard[1].wait(5)
