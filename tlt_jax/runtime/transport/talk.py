"""A talk between two processes: whole values, with arrays, one after the other."""

from multiprocessing import connection
from typing import Any

from tlt_jax.runtime.transport import links, messages

_MOST_BYTES = 1 << 30


class TalkError(ConnectionError):
    """The other process has ended, is silent, or says what none of ours says."""


class Talk:
    """One end of a connection whose ends know the secret; for one thread at a time.

    Attributes:
      traffic: bytes sent and received.
    """

    def __init__(self, link: connection.Connection):
        """Take a connection that was greeted."""
        self._link = link
        self.traffic = links.Traffic()

    def say(self, *values: Any) -> None:
        """Send values, see `messages.pack`.

        Raises:
          TalkError: the other process is gone.
        """
        message = b"".join(messages.pack(values))
        try:
            self._link.send_bytes(message)
        except OSError as error:
            raise TalkError(_why(error)) from error
        self.traffic.count(sent=len(message))

    def hear(self, within_s: float | None = None) -> tuple:
        """Wait for the values of one `say`; None: as long as the other lives.

        Raises:
          TalkError: the other process is gone, or has said nothing for so long.
        """
        try:
            if within_s is not None and not self._link.poll(within_s):
                raise TalkError(f"it was silent for {within_s:g} s")
            message = self._link.recv_bytes(_MOST_BYTES)
            self.traffic.count(received=len(message))
            values = messages.unpack(memoryview(bytearray(message)))
        except (EOFError, OSError, messages.MessageError) as error:
            raise TalkError(_why(error)) from error
        if not isinstance(values, tuple):
            raise TalkError("it said what no process says here")
        return values

    def waits(self, within_s: float = 0.0) -> bool:
        """Tell whether the other has said something that was not heard yet.

        It has, too, where it is gone, which `hear` tells.
        """
        try:
            return self._link.poll(within_s)
        except (EOFError, OSError):
            return True

    def hang_up(self) -> None:
        """Let both ends find that it is over; from any thread."""
        links.hang_up(self._link)

    def close(self) -> None:
        """End it, where no other thread waits in it."""
        self._link.close()


def _why(error: Exception) -> str:
    if isinstance(error, EOFError | ConnectionError) and not isinstance(
        error, TalkError
    ):
        return "its connection has ended"
    return str(error) or type(error).__name__
