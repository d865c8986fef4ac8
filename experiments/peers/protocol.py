"""The conversation between the harness and a runner: one JSON object a line.

The harness writes `{"command": ..., ...}` to the runner's standard input and reads one
reply. Every runner answers `load` (once), then any number of `run`, and `quit`. A
failure is answered with `{"error": traceback}`. The scripts beside this file import it
by its bare name: they run under a peer's own interpreter, without this repository's
package on the path.
"""

import collections.abc
import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import time
import traceback

_PR_SET_PDEATHSIG = 1


class Conversation:
    """Standard output kept for replies alone.

    Libraries print; whatever they write to standard output goes to standard error.
    """

    def __init__(self):
        _end_with_parent()
        self._replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def requests(self) -> collections.abc.Iterator[dict]:
        """Yields requests until `quit` or the end of the input."""
        for line in sys.stdin:
            request = json.loads(line)
            if request["command"] == "quit":
                return
            yield request

    def reply(self, answer: dict) -> None:
        """Sends one answer."""
        self._replies.write(json.dumps(answer) + "\n")
        self._replies.flush()


class StepClock:
    """Times a peer's generation within its own training loop, and answers a step."""

    def __init__(self, conversation: Conversation):
        self._conversation = conversation
        self._generate_s = 0.0
        self._lengths: list[int] = []

    def timed(
        self,
        generate: collections.abc.Callable,
        ids_of: collections.abc.Callable[[object], collections.abc.Iterable],
    ) -> collections.abc.Callable:
        """Returns a peer's `generate`, timed; `ids_of` tells completions' ids."""

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            result = generate(*args, **kwargs)
            self._generate_s = time.perf_counter() - start
            self._lengths = [len(ids) for ids in ids_of(result)]
            return result

        return wrapped

    def answer(self, step_s: float) -> None:
        """Answers a `run` request with what its step took."""
        self._conversation.reply(
            {
                "step_s": step_s,
                "generate_s": self._generate_s,
                "update_s": step_s - self._generate_s,
                "completion_tokens": sum(self._lengths),
                "length_max": max(self._lengths),
            }
        )


def serve(
    handlers: dict[str, collections.abc.Callable[[dict], dict]],
) -> None:
    """Answers each request by the handler of its command until told to quit."""
    conversation = Conversation()
    for request in conversation.requests():
        try:
            answer = handlers[request["command"]](request)
        except Exception:  # whatever a peer raises is its answer, not our crash
            answer = {"error": traceback.format_exc()}
        conversation.reply(answer)


def _end_with_parent() -> None:
    """Asks Linux to kill this process with the harness.

    A stopped runner would not notice that its input has ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of installed packages by name."""
    return {name: importlib.metadata.version(name) for name in packages}


def digit_fraction(text: str) -> float:
    """Returns the share of digits in a text: the reward of the step benchmark.

    It needs no library, costs nothing and nearly always differs within a group, so
    that no system can skip an update for want of an advantage.
    """
    return sum(c.isdigit() for c in text) / max(1, len(text))


def judge(example: object, text: str) -> float:
    """Scores a completion for this package's trainer."""
    return digit_fraction(text)
