"""The side of a foreign process: takes numbered jobs, gives numbered answers.

It imports nothing before it has begun, so that it begins quickly, and its warden is
forked while there is one thread. Jobs are pickles, since they come from us; answers are
JSON, since whoever reads them must not run what foreign code has written.
"""

import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import traceback
from collections.abc import Iterator
from typing import Any

# Number of the job and size of what follows, in bytes.
HEADER = struct.Struct("<QQ")
# A process ends itself this long after its time limit, should nobody be left to do it.
_GRACE_S = 10.0
_STATM = "/proc/self/statm"


def serve(link_fd: int, life_fd: int) -> None:
    """Runs the process: receives what makes the function, then calls it job by job.

    The first message is `(entry, payload, limit_s, memory_bytes)`: what `entry`,
    `package.module:name`, returns of the payload is called with every job. All ends
    when nobody holds the other end of `life_fd` any more.
    """
    _leave_nothing(link_fd, life_fd)
    link = socket.socket(fileno=link_fd)
    try:
        _, message = _receive(link)
        entry, payload, limit_s, memory_bytes = pickle.loads(message)
        module, _, name = entry.partition(":")
        call = getattr(importlib.import_module(module), name)(payload)
        _limit_memory(memory_bytes)
    except Exception as error:  # Whatever importing foreign code raises.
        _send(link, 0, describe(error))
        return
    _send(link, 0, None)
    with contextlib.suppress(EOFError):
        while True:
            number, message = _receive(link)
            # Ends this process even where Python code is never reached.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
            answer = call(pickle.loads(message))
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            _send(link, number, answer)


@contextlib.contextmanager
def forks_end_here() -> Iterator[None]:
    """Ends a process that foreign code has forked where it would leave that code."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            os._exit(0)


def describe(error: BaseException) -> str:
    """Says in one line of at most 500 characters what was raised, and where."""
    try:
        text = str(error)
    except BaseException as second:  # Foreign code, too.
        text = f"(its text raises {type(second).__name__})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {text[:500]}{where}")[:500]


def printable(text: str) -> str:
    """Escapes what cannot be shown or written: line ends, halves of characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _leave_nothing(link_fd: int, life_fd: int) -> None:
    """Forks the warden, which ends this session when nobody needs it any more.

    A time limit of ours does not reach what the foreign code has started, and the one
    that has started us may be killed.
    """
    if os.fork():
        os.close(life_fd)
        return
    os.close(link_fd)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    waiting = select.poll()
    waiting.register(life_fd, 0)  # Nothing is written there: it is the hang-up.
    waiting.poll()
    os.killpg(0, signal.SIGKILL)


def _limit_memory(memory_bytes: int) -> None:
    """Allows so much address space more than there is now; 0: all."""
    if not memory_bytes or not os.path.exists(_STATM):
        return
    import resource  # Not on every system.

    with open(_STATM, encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    most = used + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _receive(link: socket.socket) -> tuple[int, bytes]:
    number, size = HEADER.unpack(_exactly(link, HEADER.size))
    return number, _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = link.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(link: socket.socket, number: int, answer: Any) -> None:
    data = json.dumps(answer).encode()
    link.sendall(HEADER.pack(number, len(data)) + data)
