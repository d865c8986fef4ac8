"""Where processes come in that serve a run and are no part of its world.

They call, again and again, until somebody listens; both sides show that they know the
run's secret, and who has other code, libraries or settings is told so and sent away.
"""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import AuthenticationError, connection

from tlt_jax.runtime.transport import links, talk

# What a caller has to be answered within.
ANSWER_S = 60.0
# How often a caller looks whether somebody listens.
_LOOK_S = 0.1
_MOST_CALLERS = 1 << 16

Come = tuple[int, talk.Talk]


class Door:
    """Lets callers in; who does not belong here is told why, or hung up on."""

    def __init__(self, address: Sequence, secret: bytes, about: Mapping[str, str]):
        """Listen; `about` are code, libraries and settings, which all must share.

        Raises:
          OSError: another program listens there.
        """
        self._secret, self._about = secret, dict(about)
        self._changed = threading.Condition()
        self._come: list[Come] = []
        self._closed = False
        self._listener = links.listen(address, 64, self._greet, lambda: self._closed)

    def take(self, num: int = 0, within_s: float = 0.0) -> list[Come]:
        """Return who has come since the last call, by number; wait for `num` so long.

        A closed door is not waited at.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._come) >= num, within_s
            )
            come, self._come = self._come, []
        return come

    def close(self) -> None:
        """Let nobody in any more; who waits in `take` goes on."""
        with self._changed:
            was_closed, self._closed = self._closed, True
            self._changed.notify_all()
        if not was_closed:
            links.stop_listening(self._listener)

    def _greet(self, caller: connection.Connection) -> None:
        try:
            number, about = links.greet(caller, self._secret)
            fits = type(number) is int and 0 <= number < _MOST_CALLERS
            if not fits or type(about) is not dict:
                raise ValueError(f"number={number!r} is no worker.")
        except (OSError, EOFError, ValueError, TypeError, AuthenticationError):
            caller.close()
            return
        its = talk.Talk(caller)
        other = [name for name in self._about if about.get(name) != self._about[name]]
        with contextlib.suppress(talk.TalkError):
            its.say("refused" if other else "welcome", *other)
            if not other and not self._closed:
                with self._changed:
                    self._come.append((number, its))
                    self._changed.notify_all()
                return
        its.hang_up()


def enter(
    address: Sequence, secret: bytes, number: int, about: Mapping[str, str]
) -> tuple[talk.Talk, str]:
    """Call at a door until somebody opens; show that this process belongs there.

    Returns:
      The talk, and what differs of `about`: nothing if it was let in.
    """
    while True:
        try:
            its = talk.Talk(links.connect(address, secret, [number, dict(about)]))
            told, *other = its.hear(ANSWER_S)
        except (OSError, EOFError, AuthenticationError):
            time.sleep(_LOOK_S)
            continue
        return its, "" if told == "welcome" else str(other[0])
