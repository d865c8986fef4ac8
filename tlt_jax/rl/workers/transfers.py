"""What is large between a learner and its separate workers: it goes round a ring.

The learner's first process and those workers that are to have the same make one for the
occasion, so that it leaves the learner once, however many they are. Of a ring of two
the worker gives something back. Through their talks goes only how large it is.
"""

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from tlt_jax.rl.workers import distant
from tlt_jax.runtime import distributed
from tlt_jax.runtime.transport import door, links, messages, ring, talk


class Sending(contextlib.AbstractContextManager):
    """The learner's end; a context in which nobody else speaks with the workers.

    Attributes:
      failed: why workers have failed, by their numbers.
    """

    def __init__(
        self,
        meeting: distributed.Meeting,
        workers: Sequence[distant.Distant],
        what: str,
        number: int,
        silent_s: float,
        traffic: links.Traffic,
    ):
        """Join the workers in a ring, whose first member this process is.

        `what` and `number` are those of `Distant.has`. Bytes are counted in `traffic`.
        """
        self._workers = sorted(workers, key=lambda one: one.number)
        self._what, self._number = what, number
        self._silent_s, self._traffic = silent_s, traffic
        self._num, self.failed = 1 + len(self._workers), dict[int, str]()
        self._ring: ring.Ring | None = None
        self._closing = contextlib.ExitStack()
        for one in self._workers:
            self._closing.enter_context(one.busy)
        secret = secrets.token_bytes(32)
        own = ring.Ring(0, self._num, meeting.host, secret, silent_s)
        addresses = [list(own.address)]
        for index, one in enumerate(self._workers, 1):
            self._tell(one, what, number, index, self._num, secret, silent_s)
            addresses += self._ask(one, door.ANSWER_S) or [None]
        for one in self._workers:
            self._tell(one, None if self.failed else addresses)
        if self.failed:
            own.close()
            return
        self._ring = own
        with self._guarded():
            own.connect([tuple(address) for address in addresses])

    def __exit__(self, *_: object) -> None:
        self._close()
        self._closing.close()

    def send(self, value: Any) -> None:
        """Send a value with arrays; see `messages`."""
        if self._ring is None:
            return
        pieces = messages.pack(value)
        size = messages.size(pieces)
        for one in self._workers:
            self._tell(one, "part", size)
        with self._guarded():
            self._ring.gather([size, *[0] * (self._num - 1)], pieces)

    def hand_over(self, is_all: bool = True) -> None:
        """Say that this was all, or that no more comes; hear who has it now."""
        for one in self._workers:
            self._tell(one, "whole" if is_all else "given up")
        for one in self._workers:
            found = self._ask(one, self._silent_s)
            if found:
                one.has[self._what], one.is_ready = found

    def take(self, size: int) -> Any:
        """Take a value of so many bytes that the only worker gives.

        Raises:
          talk.TalkError: it is gone.
        """
        found = None
        with self._guarded():
            found = self._ring.gather([0, size], [])[1]
        if found is None:
            raise talk.TalkError("it has left while it gave what it has learned")
        return messages.unpack(found)

    def _close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            through = self._ring.traffic
            self._traffic.count(through.sent_bytes, through.received_bytes)
            self._ring = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Give the ring up where it breaks: who is gone does not answer at the end."""
        try:
            yield
        except ring.RingError:
            self._close()

    def _tell(self, one: distant.Distant, *values: Any) -> None:
        if one.number not in self.failed:
            try:
                one.talk.say(*values)
            except talk.TalkError as error:
                self.failed[one.number] = str(error)

    def _ask(self, one: distant.Distant, within_s: float) -> tuple:
        """Hear what a worker answers; nothing: it has failed."""
        if one.number in self.failed:
            return ()
        try:
            return one.talk.hear(within_s)
        except talk.TalkError as error:
            self.failed[one.number] = str(error)
            return ()


class Taking(contextlib.AbstractContextManager):
    """A worker's end.

    Attributes:
      is_whole: nothing is missing so far.
    """

    def __init__(
        self,
        its: talk.Talk,
        host: str,
        index: int,
        num: int,
        secret: bytes,
        silent_s: float,
    ):
        """Join the ring that the learner tells of, from the address `host`."""
        self._talk, self._index, self._num = its, index, num
        self._ring = ring.Ring(index, num, host, secret, silent_s)
        its.say(list(self._ring.address))
        (addresses,) = its.hear()
        self.is_whole = addresses is not None
        if self.is_whole:
            try:
                self._ring.connect([tuple(address) for address in addresses])
            except ring.RingError:
                self.is_whole = False

    def __exit__(self, *_: object) -> None:
        self._ring.close()

    def values(self) -> Iterator[Any]:
        """Take what comes, value by value, until the learner says that it was all."""
        while True:
            match self._talk.hear():
                case "part", size:
                    part = self._take(size)
                    if part is not None:
                        yield messages.unpack(part)
                    # It is not kept while the next one comes.
                    del part
                case told:
                    self.is_whole = self.is_whole and told == ("whole",)
                    return

    def give(self, pieces: Sequence[memoryview]) -> None:
        """Give the learner, in a ring of two, a value that `messages.pack` has made."""
        # Where that is not possible the learner finds out, too.
        with contextlib.suppress(ring.RingError):
            self._ring.gather([0, messages.size(pieces)], pieces)

    def _take(self, size: int) -> memoryview | None:
        if self.is_whole:
            try:
                return self._ring.gather([size, *[0] * (self._num - 1)], [])[0]
            except ring.RingError:
                self.is_whole = False
        return None
