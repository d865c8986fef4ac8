"""A conversation on a terminal: lines are answered until there are no more."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

HELP = (
    "/clear begins anew, /exit or the end of the input ends it, Ctrl-C interrupts an "
    "answer."
)

Message = dict[str, str]
# Messages, and what takes the answer's text as it comes; it returns the whole answer.
Answer = Callable[[Sequence[Message], Callable[[str], None]], str]


class Interrupted(Exception):
    """The user has interrupted an answer."""


def converse(
    answer: Answer,
    *,
    system: str | None = None,
    read: Callable[[str], str] = input,
    file: TextIO | None = None,
) -> list[Message]:
    """Read a line, show its answer, and keep both, until there are no more lines.

    An answer that is interrupted stays in the conversation as far as it came. One that
    cannot be given (`ValueError`: the conversation has become too long, say) is told in
    a line, and its question is forgotten.

    Args:
      answer: answers the last of some messages.
      system: a first message; None: none.
      read: shows a prompt and returns a line; `EOFError` where there is none.
      file: where answers are shown; None: standard output.

    Returns:
      The conversation.
    """
    file = file or sys.stdout
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return messages
        except KeyboardInterrupt:
            # What was typed is dropped, as shells do.
            print(file=file)
            continue
        if line == "/exit":
            return messages
        if line == "/clear":
            messages = list(first)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        shown: list[str] = []

        def show(piece: str, shown: list[str] = shown) -> None:
            shown.append(piece)
            print(piece, end="", file=file, flush=True)

        try:
            text = answer(asked, show)
        except Interrupted:
            text = "".join(shown)
            print(" [interrupted]", end="", file=file)
        except ValueError as error:
            print(f"[{error}]", file=file, flush=True)
            continue
        print(file=file, flush=True)
        messages = [*asked, {"role": "assistant", "content": text}]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C be seen where it does no harm.

    Yields what raises `Interrupted` once Ctrl-C was pressed; a second Ctrl-C ends the
    program as ever.
    """
    pressed = False

    def press(number, frame):
        nonlocal pressed
        del number, frame
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check():
        if pressed:
            raise Interrupted

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
