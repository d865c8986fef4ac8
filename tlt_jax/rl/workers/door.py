"""Where separate rollout workers come in, to the learner's first process."""

import contextlib
import threading
from collections.abc import Mapping
from multiprocessing import AuthenticationError, connection

from tlt_jax.rl.workers import distant
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime.transport import links, talk

_MOST_WORKERS = 1 << 16


class Door:
    """Lets workers in; who does not belong here is told why, or hung up on."""

    def __init__(self, meeting: distributed.Meeting, about: Mapping[str, str]):
        """Listen; `about` are code, libraries and settings, which all must share.

        Raises:
          failures.UserError: another program listens there.
        """
        self._meeting, self._about = meeting, dict(about)
        self._changed = threading.Condition()
        self._come: list[distant.Distant] = []
        self._closed = False
        try:
            self._listener = links.listen(
                meeting.address, 64, self._greet, lambda: self._closed
            )
        except OSError as error:
            host, port = meeting.address
            raise failures.UserError(
                f"another program listens at {host}:{port} ({error.strerror}): the "
                "same command takes another port."
            ) from error

    def take(self, num: int = 0, within_s: float = 0.0) -> list[distant.Distant]:
        """Return who has come since the last call; wait for `num` of them so long."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._come) >= num, within_s)
            come, self._come = self._come, []
        return come

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True
        links.stop_listening(self._listener)
        for one in self.take():
            one.dismiss()

    def _greet(self, caller: connection.Connection) -> None:
        try:
            number, about = links.greet(caller, self._meeting.secret)
            fits = type(number) is int and 0 <= number < _MOST_WORKERS
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
                    self._come.append(distant.Distant(number, its))
                    self._changed.notify_all()
                return
        its.hang_up()
