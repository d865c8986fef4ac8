"""The foreign side's own parts: what is said of an error, and messages of two sizes."""

import socket
import threading

import pytest

from tlt_jax.foreign import serving


def test_printable_text_stays():
    assert serving.printable("caf\u00e9 \u65e5") == "caf\u00e9 \u65e5"
    assert serving.printable("a\nb\x1b[31m\udc80") == r"a\nb\x1b[31m\udc80"


class Mute(Exception):
    def __str__(self):
        raise KeyError("no text")


def test_an_error_is_one_line():
    assert serving.describe(ValueError("a\nb")) == r"ValueError: a\nb"
    assert serving.describe(Mute()) == "Mute: (its text raises KeyError)"
    assert serving.describe(ValueError("x" * 900)) == "ValueError: " + "x" * 488
    try:
        raise OSError("gone")
    except OSError as error:
        said = serving.describe(error)
    line = test_an_error_is_one_line.__code__.co_firstlineno + 5
    assert said == f"OSError: gone ({__file__}:{line})"


def test_messages_are_whole_whatever_pieces_they_come_in():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = bytes(range(256)) * 12_000
        sent = serving.HEADER.pack(7, len(body)) + body
        sender = threading.Thread(target=theirs.sendall, args=(sent,))
        sender.start()
        assert serving._receive(ours) == (7, body)
        sender.join()
        serving._send(theirs, 9, ["half \ud83d", 2])
        number, answer = serving._receive(ours)
        assert (number, answer) == (9, b'["half \\ud83d", 2]')
        theirs.sendall(serving.HEADER.pack(8, 5) + b"cut")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            serving._receive(ours)
