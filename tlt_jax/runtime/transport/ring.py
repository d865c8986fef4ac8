"""A ring of direct connections, on which what is large goes round once.

Every process is connected with the next one, the last with the first. What each brings,
its part, is sent to the next, which passes it on as it comes, until all have it. So a
process sends every part at most once and receives every part of the others once:

    bytes through a process <= 2 x bytes of all parts,

for any number of processes and however uneven the parts are. One that brings all (a
drafter that it alone has trained) sends it once, as all others but the last do.
"""

import queue
import socket
import threading
from collections.abc import Sequence
from multiprocessing import AuthenticationError, connection

from tlt_jax.runtime.transport import links

# How much is passed on at once, and how long neighbours may take to connect.
_CHUNK_BYTES = 1 << 20
_CONNECT_S = 60.0


class RingError(ConnectionError):
    """A neighbour is gone."""


class Ring:
    """This process's place in the ring.

    Attributes:
      traffic: bytes of parts that this process has sent and received.
    """

    def __init__(
        self,
        index: int,
        num: int,
        host: str,
        secret: bytes,
        silent_s: float | None = None,
    ):
        """Listen on a free port of `host`; `num` processes, at least two.

        A neighbour that neither sends nor takes anything for `silent_s` while parts go
        round is taken for gone; None: it may take as long as it lives.
        """
        self._silent_s = silent_s
        self._index, self._num, self._secret = index, num, secret
        self.traffic = links.Traffic()
        self._before: socket.socket | None = None
        self._after: socket.socket | None = None
        self._links: list[connection.Connection] = []
        self._found: queue.Queue[connection.Connection] = queue.Queue()
        self._closed = False
        # Held while parts go round: until then connections are hung up on, not closed.
        self._busy = threading.Lock()
        # Once the process before this one has come nobody else is waited for.
        self._listener = links.listen(
            (host, 0), 8, self._greet, lambda: self._closed or self._before is not None
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._listener.address

    def connect(self, addresses: Sequence[Sequence]) -> None:
        """Join the neighbours; `addresses` are of all processes, which do the same.

        Raises:
          RingError: a neighbour cannot be reached, or does not come.
        """
        follower = (self._index + 1) % self._num
        try:
            after = links.connect(addresses[follower], self._secret, self._index)
        except (OSError, EOFError, AuthenticationError) as error:
            why = str(error) or type(error).__name__
            raise RingError(
                f"process {follower} cannot be reached at "
                f"{':'.join(map(str, addresses[follower]))} ({why}): every process's "
                "host must be reachable from the one before it. TLT_JAX_HOST names a "
                "host's address where its name is not it."
            ) from error
        self._links.append(after)
        try:
            before = self._found.get(timeout=_CONNECT_S)
        except queue.Empty:
            raise RingError(
                f"process {(self._index - 1) % self._num} did not connect to process "
                f"{self._index} within {_CONNECT_S:g} s."
            ) from None
        self._links.append(before)
        self._before, self._after = links.socket_of(before), links.socket_of(after)
        self._before.settimeout(self._silent_s)
        self._after.settimeout(self._silent_s)

    def gather(
        self, sizes: Sequence[int], own: Sequence[memoryview]
    ) -> list[memoryview | None]:
        """Send this process's part round and receive all others'.

        Args:
          sizes: bytes of every process's part, the same for all.
          own: pieces of this one's, in order.

        Returns:
          The others' parts by process, in memory of their own; None at this one's.

        Raises:
          RingError: a neighbour is gone, or `close` was called.
        """
        parts = [
            memoryview(bytearray(0 if i == self._index else n))
            for i, n in enumerate(sizes)
        ]
        # As they come: from the process before this one, from the one before that, ...
        order = [(self._index - i) % self._num for i in range(1, self._num)]
        with self._busy:
            error = self._go_round(parts, order, own)
        if error is not None:
            self.close()
            raise RingError(f"the ring of processes is broken ({error}).") from error
        return [None if i == self._index else p for i, p in enumerate(parts)]

    def close(self) -> None:
        """Leave the ring; who waits for this process is told."""
        was_closed, self._closed = self._closed, True
        for link in self._links:
            links.hang_up(link)
        if not was_closed:
            links.stop_listening(self._listener)
        with self._busy:
            for end in (self._before, self._after, *self._links):
                if end is not None:
                    end.close()

    def _go_round(self, parts, order, own) -> OSError | None:
        """Send and receive; return what came in between."""
        passing = _Passing(self._after, own, [parts[i] for i in order[:-1]])
        sender = threading.Thread(target=passing.run, daemon=True, name="ring sender")
        sender.start()
        error = None
        try:
            for place, source in enumerate(order):
                self._receive(parts[source], place, passing)
        except OSError as met:
            error = met
            for link in self._links:
                links.hang_up(link)
            passing.stop()
        sender.join()
        self.traffic.count(sent=passing.num_bytes)
        return error or passing.error

    def _receive(self, part: memoryview, place: int, passing: "_Passing") -> None:
        at = 0
        while at < len(part):
            count = self._before.recv_into(part[at : at + _CHUNK_BYTES])
            if not count:
                raise ConnectionError("the process before this one has left")
            at += count
            self.traffic.count(received=count)
            passing.has_come(place, at)

    def _greet(self, caller: connection.Connection) -> None:
        """Take the process before this one; strangers are hung up on."""
        try:
            if links.greet(caller, self._secret) == (self._index - 1) % self._num:
                self._found.put(caller)
                return
        except (OSError, EOFError, ValueError, TypeError, AuthenticationError):
            pass
        caller.close()


class _Passing:
    """What a process sends to the next one: its own part, and others' as they come.

    Attributes:
      num_bytes: sent so far.
      error: why it ended early.
    """

    def __init__(
        self,
        link: socket.socket,
        own: Sequence[memoryview],
        others: Sequence[memoryview],
    ):
        self._link, self._own, self._others = link, own, others
        self._came = [0] * len(others)
        self._changed, self._stopped = threading.Condition(), False
        self.num_bytes = 0
        self.error: OSError | None = None

    def has_come(self, place: int, num_bytes: int) -> None:
        """Note how much of the part at `place` may be passed on."""
        if place < len(self._came):
            with self._changed:
                self._came[place] = num_bytes
                self._changed.notify()

    def stop(self) -> None:
        """Let `run` end: nothing more will come."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Send all; a thread's body."""
        try:
            for piece in self._own:
                self._send(piece.cast("B"))
            for place, part in enumerate(self._others):
                at = 0
                while at < len(part):
                    with self._changed:
                        while self._came[place] == at and not self._stopped:
                            self._changed.wait()
                        if self._stopped:
                            return
                        until = self._came[place]
                    self._send(part[at:until])
                    at = until
        except OSError as error:
            self.error = error

    def _send(self, piece: memoryview) -> None:
        self._link.sendall(piece)
        self.num_bytes += len(piece)
