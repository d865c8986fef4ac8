"""Connections between processes that share a secret, and what they have carried.

Who connects and does not show in time that it knows the secret is hung up on. A
`Traffic` counts the bytes that a process sends and receives.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

# Who connects has so long to show that it belongs here.
_HANDSHAKE_S = 10.0
# Of what a caller says first.
_MOST_GREETING_BYTES = 4096


class Traffic:
    """Bytes that a process has sent and received; counted by several threads.

    Attributes:
      sent_bytes, received_bytes: up to now.
    """

    def __init__(self):
        """Begin at nothing."""
        self._lock = threading.Lock()
        self.sent_bytes = self.received_bytes = 0

    @property
    def num_bytes(self) -> int:
        """All that went through this process, either way."""
        return self.sent_bytes + self.received_bytes

    def count(self, sent: int = 0, received: int = 0) -> None:
        """Add to it."""
        with self._lock:
            self.sent_bytes += sent
            self.received_bytes += received


def listen(
    address: Sequence,
    num_waiting: int,
    handle: Callable[[connection.Connection], None],
    is_over: Callable[[], bool],
) -> connection.Listener:
    """Listen at host and port (0: a free one) and hand on every caller.

    `handle` has a thread for each, so that who is slow holds up nobody; it is for it to
    `greet` them. `num_waiting` callers may wait to be taken. A thread goes on until
    `is_over`, which it finds at the next caller: see `stop_listening`.

    Raises:
      OSError: it cannot be listened there.
    """
    # Without the secret: that handshake would hold up all who come later.
    listener = connection.Listener(tuple(address), None, num_waiting)

    def accept():
        while not is_over():
            try:
                caller = listener.accept()
            except OSError:
                # Closed by us, or by somebody who has changed their mind.
                continue
            if is_over():
                caller.close()
                return
            threading.Thread(target=handle, args=(caller,), daemon=True).start()

    threading.Thread(target=accept, daemon=True, name="listener").start()
    return listener


def greet(caller: connection.Connection, secret: bytes) -> Any:
    """Let a caller show that it knows the secret; return what it says of itself.

    Raises:
      multiprocessing.AuthenticationError, OSError, EOFError, ValueError: it does not,
        is too slow, or says nothing that JSON is.
    """
    with _deadline(caller):
        _send_at_once(caller)
        connection.deliver_challenge(caller, secret)
        connection.answer_challenge(caller, secret)
        return json.loads(caller.recv_bytes(_MOST_GREETING_BYTES))


def connect(address: Sequence, secret: bytes, greeting: Any) -> connection.Connection:
    """Call who listens at host and port, with a greeting that is fit for JSON.

    Raises:
      multiprocessing.AuthenticationError, OSError, EOFError: nobody does, or another.
    """
    link = connection.Client(tuple(address))
    try:
        with _deadline(link):
            _send_at_once(link)
            connection.answer_challenge(link, secret)
            connection.deliver_challenge(link, secret)
            link.send_bytes(json.dumps(greeting).encode())
    except BaseException:
        link.close()
        raise
    return link


def hang_up(link: connection.Connection) -> None:
    """Let both ends of a connection find that it is over."""
    with contextlib.suppress(OSError), socket_of(link) as same:
        same.shutdown(socket.SHUT_RDWR)


def stop_listening(listener: connection.Listener) -> None:
    """Close a listener in which another thread waits for callers; it finds out."""
    with contextlib.suppress(OSError):
        # Closing it would not be told. Who waits there hangs up on this caller, and
        # until then the address is taken.
        with socket.create_connection(listener.address, _HANDSHAKE_S) as last:
            last.recv(1)
    with contextlib.suppress(OSError):
        listener.close()


def socket_of(link: connection.Connection) -> socket.socket:
    """Return a second handle of the connection's socket."""
    return socket.socket(fileno=os.dup(link.fileno()))


@contextlib.contextmanager
def _deadline(link: connection.Connection) -> Iterator[None]:
    """Hang up unless what follows is done in time, however slowly it goes on."""
    timer = threading.Timer(_HANDSHAKE_S, hang_up, [link])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _send_at_once(link: connection.Connection) -> None:
    """Keep messages of several parts from waiting for each part's acknowledgement."""
    with socket_of(link) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
