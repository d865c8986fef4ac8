"""A channel between the processes of a run: meetings, and calls of offered objects.

Process 0 listens; the others connect with a secret that they were given. Who connects
and does not show in time that it knows the secret is hung up on, and holds up nobody.
What is said here is small: numbers, texts and records of this package (`messages`).
Arrays are refused, as all of it goes through process 0; they have a way of their own
(`ring`). Who ends without saying goodbye, or hangs, breaks the channel: all who wait
are told which process is gone.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from tlt_jax.runtime import failures
from tlt_jax.runtime.transport import links, messages

_GOODBYE, _BEAT = b"goodbye", b"beat"
_BEAT_S = 5.0
# JAX gives a process up a little later, and then ends all without a word for users.
_SILENT_S = 45.0
# Of a beat; of a call, which carries no arrays.
_MOST_SHORT_BYTES, _MOST_BYTES = 4096, 1 << 24
# What waits for a process that is gone has so long to find out by itself.
_LEAVE_S = 10.0
# Of `Server`, what its clients call.
_OWN_METHODS = frozenset(["meet", "check"])
_REMEDY = "The same command resumes from the newest checkpoint."


class ProcessError(failures.UserError):
    """Another process of the run has ended or does something else."""


def loads(message: bytes) -> Any:
    """Make a value of a message; see `messages.loads`.

    Raises:
      ProcessError: the message holds what no process sends here, or is no message.
    """
    try:
        return messages.loads(message)
    except messages.MessageError as error:
        raise ProcessError(str(error)) from error


class Server:
    """The end of process 0. Objects that are offered here are called by the others.

    Attributes:
      traffic: bytes of calls and answers.
    """

    def __init__(
        self,
        num_processes: int,
        host: str,
        secret: bytes,
        silent_s: float = _SILENT_S,
        on_gone: Callable[[str], None] | None = None,
    ):
        """Listen on a free port of `host`.

        Args:
          num_processes: of the run, this one included.
          host: an address of this machine that the others can reach.
          secret: what a caller must know.
          silent_s: a process of which nothing is heard for so long is gone.
          on_gone: called with the reason when a process is gone and this one has not
            closed the channel some seconds later: it may wait where nothing wakes it.
        """
        self._silent_s, self._on_gone = silent_s, on_gone
        self.traffic = links.Traffic()
        self._left = threading.Event()
        self._life_lines: set[connection.Connection] = set()
        self._num = num_processes
        self._secret = secret
        self._objects: dict[str, Any] = {}
        self._actions: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._meetings: dict[int, _Meeting] = {}
        self._gone: set[int] = set()
        self._callers: set[connection.Connection] = set()
        self._broken: str | None = None
        self._closed = False
        self._listener = links.listen(
            (host, 0), 4 * num_processes, self._serve, lambda: self._closed
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._listener.address

    def when_broken(self, action: Callable[[], None]) -> None:
        """Call this, by another thread, where a process is found to be gone."""
        with self._changed:
            self._actions.append(action)

    def offer(self, name: str, target: Any) -> None:
        """Let the others call methods of `target`; its `close` tells it of the end."""
        with self._changed:
            self._objects[name] = target
            self._changed.notify_all()

    def meet(self, number: int, topic: str, index: int, value: Any) -> list[Any]:
        """Wait until every process has come to a meeting; return what all brought.

        All count meetings alike. They tell the `topic`, so that it is seen where they
        do not do the same; `index` says whose value it is.

        Raises:
          ProcessError: a process is gone, or came for something else.
        """
        with self._changed:
            meeting = self._meetings.setdefault(number, _Meeting(topic))
            if meeting.topic != topic:
                self._break(
                    f"process {index} came to {topic!r} while others came to "
                    f"{meeting.topic!r}: all processes must run the same program with "
                    "the same settings."
                )
            # Before it counts as one that has come: it may be the last.
            self.check()
            meeting.values[index] = value
            self._changed.notify_all()
            while len(meeting.values) < self._num:
                self.check()
                self._changed.wait()
            meeting.num_left += 1
            if meeting.num_left == self._num:
                del self._meetings[number]
            return [meeting.values[i] for i in range(self._num)]

    def check(self) -> None:
        """Raise a `ProcessError` if a process is gone."""
        with self._changed:
            if self._broken:
                raise ProcessError(f"{self._broken} {_REMEDY}")

    def close(self, failed: bool = False) -> None:
        """Leave when the others have; after a failure at once, and tell them."""
        self._left.set()
        with self._changed:
            if failed:
                self._break("process 0 has failed.")
            self._changed.wait_for(
                lambda: self._broken or len(self._gone) == self._num - 1, timeout=120.0
            )
            self._closed = True
            for caller in self._callers:
                links.hang_up(caller)
        self._listener.close()

    def _serve(self, caller: connection.Connection) -> None:
        """Answer one caller until it leaves."""
        index, is_life_line = None, False
        with self._changed:
            self._callers.add(caller)
        try:
            index, is_life_line = self._greet(caller)
            if is_life_line:
                self._watch(index, caller)
                return
            while True:
                answer = self._answer(_receive(caller, self.traffic))
                _send(caller, answer, self.traffic)
        except (EOFError, OSError):
            if is_life_line and not self._closed:
                with self._changed:
                    self._break(f"process {index} has ended.")
        except (connection.AuthenticationError, ValueError, TypeError):
            # Somebody who does not belong here.
            pass
        finally:
            with self._changed:
                self._callers.remove(caller)
            caller.close()

    def _greet(self, caller: connection.Connection) -> tuple[int, bool]:
        """Let a caller show that it knows the secret, and say who it is."""
        index, is_life_line = links.greet(caller, self._secret)
        if type(index) is not int or not 0 < index < self._num:
            raise ValueError(f"index={index!r} is no process of {self._num}.")
        return index, bool(is_life_line)

    def _watch(self, index: int, caller: connection.Connection) -> None:
        """Follow a process's life line until it says goodbye."""
        with self._changed:
            self._life_lines.add(caller)
        while caller.poll(self._silent_s):
            if caller.recv_bytes(_MOST_SHORT_BYTES) == _GOODBYE:
                with self._changed:
                    self._life_lines.remove(caller)
                    self._gone.add(index)
                    self._changed.notify_all()
                return
        with self._changed:
            self._break(f"process {index} was silent for {self._silent_s:g} s.")

    def _answer(self, message: bytes) -> tuple[bool, Any]:
        try:
            name, method, args = loads(message)
            if method.startswith("_") or (name is None and method not in _OWN_METHODS):
                raise ProcessError(f"{name}.{method} is not called by other processes.")
            target = self if name is None else self._object(name)
            return True, getattr(target, method)(*args)
        # All of them: the object may raise anything, this thread knows none of it, and
        # the caller in the other process, who waits for an answer, raises it there.
        except Exception as error:
            try:
                loads(messages.dumps(error))
            # Errors may be made in any way, and not all can be made again.
            except Exception:
                error = RuntimeError(f"{type(error).__name__}: {error}")
            return False, error

    def _object(self, name: str) -> Any:
        with self._changed:
            while name not in self._objects:
                self.check()
                self._changed.wait()
            return self._objects[name]

    def _break(self, reason: str) -> None:
        if self._broken:
            return
        self._broken = reason
        self._changed.notify_all()
        told = f"{reason} {_REMEDY}"
        for life_line in self._life_lines:
            with contextlib.suppress(OSError):
                life_line.send_bytes(told.encode()[:_MOST_SHORT_BYTES])
        _leave_later(self._left, self._on_gone, told)
        for action in self._actions:
            action()
        for target in self._objects.values():
            if hasattr(target, "close"):
                target.close()


@dataclasses.dataclass
class _Meeting:
    topic: str
    values: dict[int, Any] = dataclasses.field(default_factory=dict)
    num_left: int = 0


class Client:
    """The end of another process. Calls by several threads go side by side.

    Attributes:
      traffic: bytes of calls and answers.
    """

    def __init__(
        self,
        index: int,
        address: Sequence,
        secret: bytes,
        on_gone: Callable[[str], None] | None = None,
    ):
        """Connect as process `index`, above 0, to `Server.address`; see `Server`.

        Raises:
          ProcessError: process 0 cannot be reached.
        """
        self._index, self._address, self._secret = index, tuple(address), secret
        self.traffic = links.Traffic()
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []
        self._free: list[connection.Connection] = []
        # Its end is this process's end to the server.
        self._life_line = self._connect(True)
        self._left, self._on_gone = threading.Event(), on_gone
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def call(self, name: str | None, method: str, *args: Any) -> Any:
        """Call a method of an object that process 0 offers, or of its `Server`.

        Raises:
          ProcessError: process 0 has ended, or says that another one has.
        """
        with self._connection() as link:
            _send(link, (name, method, args), self.traffic)
            succeeded, value = loads(_receive(link, self.traffic))
        if not succeeded:
            raise value
        return value

    def meet(self, number: int, topic: str, index: int, value: Any) -> list[Any]:
        """See `Server.meet`."""
        return self.call(None, "meet", number, topic, index, value)

    def when_broken(self, action: Callable[[], None]) -> None:
        """See `Server.when_broken`."""
        with self._lock:
            self._actions.append(action)

    def check(self) -> None:
        """See `Server.check`."""
        self.call(None, "check")

    def close(self, failed: bool = False) -> None:
        """Leave; after a failure without a goodbye, so that the others are told."""
        self._left.set()
        with self._lock, contextlib.suppress(OSError):
            if not failed:
                self._life_line.send_bytes(_GOODBYE)
            # Another thread reads from it: closing it would not be told.
            links.hang_up(self._life_line)
            for link in self._free:
                link.close()

    def _beat(self) -> None:
        """Say from time to time that this process lives; hear of those that do not."""
        told = f"process 0 has ended. {_REMEDY}"
        with contextlib.suppress(EOFError, OSError):
            while not self._life_line.poll(_BEAT_S):
                with self._lock:
                    if self._left.is_set():
                        return
                    self._life_line.send_bytes(_BEAT)
            told = self._life_line.recv_bytes(_MOST_SHORT_BYTES).decode()
        if not self._left.is_set():
            with self._lock:
                actions = list(self._actions)
            for action in actions:
                action()
        _leave_later(self._left, self._on_gone, told)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[connection.Connection]:
        """Lend a connection that no other thread uses."""
        with self._lock:
            link = self._free.pop() if self._free else None
        try:
            link = link or self._connect(False)
            yield link
        except (EOFError, OSError) as error:
            raise ProcessError(f"process 0 has ended. {_REMEDY}") from error
        with self._lock:
            self._free.append(link)

    def _connect(self, is_life_line: bool) -> connection.Connection:
        try:
            return links.connect(
                self._address, self._secret, [self._index, is_life_line]
            )
        except (OSError, EOFError, connection.AuthenticationError) as error:
            why = str(error) or type(error).__name__
            raise ProcessError(
                f"process 0 cannot be reached at {self._address} ({why})."
            ) from error


def _send(link: connection.Connection, value: Any, traffic: links.Traffic) -> None:
    message = messages.dumps(value)
    if len(message) > _MOST_BYTES:
        raise ValueError(
            f"a message of {len(message)} bytes is too large for the channel, which "
            f"takes {_MOST_BYTES}: `Group.gather` sends what is large."
        )
    # Before the other side can answer, or go on: whoever has heard finds it counted.
    traffic.count(sent=len(message))
    link.send_bytes(message)


def _receive(link: connection.Connection, traffic: links.Traffic) -> bytes:
    message = link.recv_bytes(_MOST_BYTES)
    traffic.count(received=len(message))
    return message


def _leave_later(
    left: threading.Event, on_gone: Callable[[str], None] | None, told: str
) -> None:
    """Call `on_gone` unless the channel is left meanwhile."""

    def wait():
        if not left.wait(_LEAVE_S):
            on_gone(told)

    if on_gone is not None:
        threading.Thread(target=wait, daemon=True, name="leave").start()
