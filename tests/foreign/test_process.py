"""Processes for foreign code, where no reward or template tests them."""

import os
import socket
import threading
import time

import pytest

from tlt_jax.foreign import process

ECHO = "operator:itemgetter"  # Of a job it gives the item whose place is the payload.


def test_a_process_is_kept_and_one_that_is_gone_is_replaced():
    one = process.Process("an echo", ECHO, 0, process.Limits(5.0))
    assert one.call(["half \ud83d", 2]) == "half \ud83d"
    first = one._process.pid
    assert one.call([None]) is None and one._process.pid == first
    os.kill(first, 9)
    one._process.wait()
    assert one.call([3]) == 3 and one._process.pid != first
    one.close()
    with pytest.raises(process.StartError, match="an echo is closed"):
        one.call([1])


@pytest.mark.parametrize(
    ("entry", "payload", "message"),
    [
        ("no_such_module:x", None, "No module named 'no_such_module'"),
        ("operator:nothing", None, "has no attribute 'nothing'"),
        ("os:_exit", 4, r"it ended \(exit code 4\)"),
        ("sys:exit", 3, r"it ended \(exit code 3\)"),
        ("signal:raise_signal", 11, r"it ended \(signal SIGSEGV\)"),
    ],
)
def test_one_that_cannot_start_says_why(entry, payload, message):
    one = process.Process("a thing", entry, payload, process.Limits(5.0))
    with pytest.raises(process.StartError, match=f"a thing cannot start: .*{message}"):
        one.start()


def test_a_long_answer_is_none():
    one = process.Process("an echo", ECHO, 0, process.Limits(5.0, answer_bytes=100))
    with pytest.raises(process.SpoiltError):
        one.call(["a" * 100])
    assert one.call(["a" * 90]) == "a" * 90
    one.close()


def test_bytes_that_trickle_do_not_put_the_deadline_off():
    one = process.Process("a test", ECHO, 0, process.Limits(0.2))
    one._link, theirs = socket.socketpair()

    done = threading.Event()

    def trickle():
        for _ in range(200):
            if done.wait(0.02):
                break
            theirs.sendall(bytes(1))

    with one._link, theirs:
        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(TimeoutError):
            one._receive(1000, time.monotonic() + 0.2)
        assert thread.is_alive()
        done.set()
        thread.join()
