"""A rollout worker in another process, as the learner's first process sees it."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from tlt_jax import types
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.workers import columns
from tlt_jax.runtime import failures, programs
from tlt_jax.runtime.transport import door, talk

# The laws by which a worker samples: the run's own, and that of its evaluations.
ROLLOUT, EVALUATION = "rollout", "evaluation"
# What it is given, each with a number that says which.
WEIGHTS, DRAFTER, TRAINING = "weights", "drafter", "training"
# While it trains one looks so often whether it shall stop.
_LOOK_S = 0.005


class Distant:
    """A worker elsewhere.

    Attributes:
      number: its name.
      has: the number of what it was given last, by what that is.
      is_ready: it has compiled its programs, as it said last.
      texts: that it keeps for the drafter's training, their bytes, and how many it has
        dropped.
      pool: stands for its programs; of its statistics those of waiting are kept.
      busy: held by who speaks with it.
    """

    def __init__(self, number: int, its: talk.Talk):
        """Take the talk with one that was found to belong here."""
        self.number, self.talk = number, its
        self.has: dict[str, int] = {}
        self.is_ready, self.is_gone = False, False
        self.texts = (0, 0, 0)
        self.pool = programs.ProgramPool()
        self.busy = threading.Lock()

    def serve(
        self,
        source: request_queue.Share,
        seed: int,
        law: str,
        on_completion: Callable[[types.Completion], None],
        on_call: Callable[[int], None],
    ) -> rollout_stats.RolloutStats:
        """Let it generate what a queue has; see `Engine.serve`.

        Raises:
          talk.TalkError: it is gone.
          failures.Abandoned: `on_call` has raised it.
        """
        with self.busy:
            self.talk.say("serve", seed, law)
            goes_on = True
            while True:
                match self.talk.hear():
                    case ("take",):
                        request = source.take()
                        waiting = source.prompts_waiting(), source.num_waiting
                        self.talk.say(request, *waiting)
                    case "finished", part:
                        # It counts from here on: what never came is generated anew.
                        for completion in columns.completions_of(part):
                            if source.finish(completion.request_id):
                                on_completion(completion)
                    case "alive", num_tokens:
                        try:
                            on_call(num_tokens)
                        except failures.Abandoned:
                            goes_on = False
                        self.talk.say(goes_on)
                    case "served", stats, waits, texts:
                        self._note(waits)
                        self.texts = texts
                        if not goes_on:
                            raise failures.Abandoned
                        return stats
                    case other:
                        raise talk.TalkError(f"it says {other[:1]} where it decodes")

    def train(
        self,
        should_stop: Callable[[], bool],
        on_run: Callable[[], None],
        on_end: Callable[[str], bool],
    ) -> tuple:
        """Follow the training that it was given, until it has ended or shall stop.

        It stops within a piece of a step. `on_run` is called when its steps begin,
        `on_end` when its devices are free, with why it has failed or with nothing, and
        says whether what was learned counts.

        Returns:
          What it tells of it, and the bytes of what it has learned; 0: nothing.

        Raises:
          talk.TalkError: it is gone.
        """
        is_told, asked_s = False, 0.0
        while True:
            if self.talk.waits(_LOOK_S):
                match self.talk.hear(door.ANSWER_S):
                    case ("runs",):
                        on_run()
                    case "ended", reason:
                        break
                    case other:
                        raise talk.TalkError(f"it says {other[:1]} where it trains")
            elif not is_told and should_stop():
                self.talk.say("stop")
                is_told, asked_s = True, time.monotonic()
            elif is_told and time.monotonic() - asked_s > door.ANSWER_S:
                raise talk.TalkError(f"it does not stop for {door.ANSWER_S:g} s")
        if not is_told:
            self.talk.say("stop")
        self.talk.say(on_end(reason))
        return self.talk.hear(door.ANSWER_S)

    def look(self) -> bool:
        """Ask, where it was not, whether it is ready by now; the gone are not."""
        with self.busy, contextlib.suppress(talk.TalkError):
            if not self.is_ready:
                self.talk.say("ready?")
                (self.is_ready,) = self.talk.hear(door.ANSWER_S)
        return self.is_ready

    def warm_up(self, within_s: float) -> None:
        """Wait until it has compiled its programs, a training's among them.

        Raises:
          talk.TalkError: it is gone, or was silent for so long.
        """
        with self.busy:
            self.talk.say("warm up")
            (self.is_ready,) = self.talk.hear(within_s)

    def dismiss(self) -> None:
        """Let it end, at its next sign of life if a rollout was given up."""
        is_free = self.busy.acquire(timeout=door.ANSWER_S)
        with contextlib.suppress(talk.TalkError):
            if is_free:
                self.talk.say("end")
        self.talk.hang_up()

    def _note(self, waits: Sequence[tuple[float, float]]) -> None:
        """Keep when it waited for compilers, in seconds from now."""
        now = time.perf_counter()
        self.pool.stats.waits += [(now + a, now + b) for a, b in waits]
        self.pool.stats.waited_s += sum(b - a for a, b in waits)
