"""A rollout worker in a process of its own: engines that serve a learner elsewhere.

It has the target's weights and no state of the learner, but texts of its own while it
waits to train the drafter on them. Where the learner's process is gone it waits for the
one that is started in its place, and keeps its programs.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from tlt_jax import types
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.workers import columns, distant, transfers, weight_sync
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime.transport import door, talk
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.tuners import tuner as tuner_lib


class Trainee(Protocol):
    """What trains the drafter here; see `elsewhere.Trainee`."""

    capture_frac: float
    texts: tuple[int, int, int]

    def on_text(self, text: layout.Record) -> None:
        """Take a finished text."""

    def forget(self) -> None:
        """Drop the texts."""

    def begin_rollout(self, version: int) -> None:
        """Drop texts that are too old for the target's version."""

    def prepare(self) -> None:
        """Compile in the background."""

    def wait(self) -> None:
        """Wait until it is compiled."""

    def train(
        self, its: talk.Talk, taking: transfers.Taking, number: int, given: Sequence
    ) -> None:
        """Train what the learner has given, and give it back."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What a worker works with.

    Attributes:
      first: of the run's own law, which speculates; without weights.
      judge: of the law of evaluations, of the same target on the same mesh; None: it
        is the first, too.
      tuners: those of the engines, which are told of new weights and drafters.
      trainee: None: no drafter is trained.
    """

    first: engine_lib.Engine
    judge: engine_lib.Engine | None = None
    tuners: Sequence[tuner_lib.Tuner] = ()
    trainee: Trainee | None = None

    def by_law(self, law: str) -> engine_lib.Engine:
        """Return the engine that samples by a law."""
        return self.judge or self.first if law == distant.EVALUATION else self.first

    def wait(self) -> None:
        """Wait until all programs are compiled."""
        for engine in self.engines():
            engine.pool.wait()
        if self.trainee is not None:
            self.trainee.wait()

    def engines(self) -> list[engine_lib.Engine]:
        """Return those there are."""
        return [self.first, self.judge] if self.judge else [self.first]


class Worker:
    """Serves one learner after another until one says that the run has ended."""

    def __init__(
        self,
        meeting: distributed.Meeting,
        about: Mapping[str, str],
        make: Callable[[], Made],
    ):
        """Make nothing before a learner is there, whose files `make` may read.

        For `about` see `door.Door`.
        """
        self._meeting, self._about, self._make = meeting, dict(about), make
        self._made: Made | None = None
        self._parts: list[Any] = []

    def work(self) -> None:
        """Serve until the end of the run.

        Raises:
          failures.UserError: the learner has other code, libraries or settings.
        """
        while True:
            its = self._come()
            try:
                if not self._follow(its):
                    return
            except talk.TalkError:
                # The learner is gone, or has given this worker up: it comes anew.
                continue
            finally:
                its.close()

    def _come(self) -> talk.Talk:
        """Wait for a learner, and show that this process belongs to it."""
        meeting = self._meeting
        its, other = door.enter(
            *(meeting.address, meeting.secret, meeting.worker, self._about)
        )
        if other:
            raise failures.UserError(
                f"rollout worker {meeting.worker} has another {other} than the "
                "learner: start all processes with the same command, code and "
                "libraries."
            )
        return its

    def _follow(self, its: talk.Talk) -> bool:
        """Do what the learner says; false: the run has ended."""
        if self._made is None:
            self._made = self._make()
            first = self._made.first
            shardings = weight_sync.shardings_of(first.cfg, first.mesh)
            self._parts = weight_sync.in_parts(shardings)
        elif self._made.trainee is not None:
            self._made.trainee.forget()
        while True:
            match its.hear():
                case (
                    distant.WEIGHTS | distant.DRAFTER | distant.TRAINING as what,
                    int(number),
                    *told,
                ):
                    with transfers.Taking(its, self._meeting.host, *told) as taking:
                        self._take(its, taking, what, number)
                case "serve", seed, law:
                    self._serve(its, seed, law)
                case ("ready?",):
                    its.say(self._made.first.pool.is_idle)
                case ("warm up",):
                    self._made.wait()
                    its.say(True)
                case ("end",):
                    return False
                case other:
                    raise talk.TalkError(f"the learner says {other[:1]}")

    def _take(
        self, its: talk.Talk, taking: transfers.Taking, what: str, number: int
    ) -> None:
        """Take what the learner gives, say whether it is there, and use it."""
        found = []
        for value in taking.values():
            # The weights' parts go to the device as they come.
            found.append(self._place(value, len(found), what))
            del value
        is_whole = taking.is_whole
        if is_whole and what == distant.WEIGHTS:
            self._set_params(found, number)
        elif is_whole and what == distant.DRAFTER:
            self._made.first.offer_drafter(found[0], number)
            self._tell_tuners("drafter")
        its.say(number if is_whole else -1, self._made.first.pool.is_idle)
        if is_whole and what == distant.TRAINING:
            self._made.trainee.train(its, taking, number, found)

    def _place(self, value: Any, index: int, what: str) -> Any:
        """Put a part of the weights where the engines have it; leave what is else."""
        if what != distant.WEIGHTS:
            return value
        where, treedef = jax.tree.flatten(self._parts[index])
        return jax.tree.unflatten(treedef, map(jax.device_put, value, where))

    def _set_params(self, parts: Sequence[Any], version: int) -> None:
        made = self._made
        is_first = made.first.params is None
        for engine in made.engines():
            engine.set_params(weight_sync.joined(parts), version)
        self._tell_tuners("target")
        if is_first:
            for engine in made.engines():
                engine.warm_up(wait=False)
            if made.trainee is not None:
                made.trainee.prepare()

    def _tell_tuners(self, what: str) -> None:
        for tuner in self._made.tuners:
            tuner.changed(what)

    def _serve(self, its: talk.Talk, seed: int, law: str) -> None:
        """Generate what the learner's queue has."""
        made = self._made
        engine, trainee, stats = made.by_law(law), made.trainee, None
        known = len(engine.pool.stats.waits)
        # Of what an evaluation asks nothing is learned.
        is_aside = law == distant.EVALUATION
        aside = engine.aside() if is_aside else contextlib.nullcontext()
        captured = {}
        if trainee is not None and not is_aside:
            trainee.begin_rollout(engine.version)
            captured["on_text"] = trainee.on_text
            captured["capture_frac"] = trainee.capture_frac
        with aside, contextlib.suppress(failures.Abandoned):
            stats = engine.serve(
                _Share(its),
                seed,
                on_completion=lambda one: its.say(
                    "finished", columns.of_completions([one])
                ),
                on_call=lambda num_tokens: _ask_on(its, num_tokens),
                **captured,
            )
        now = time.perf_counter()
        waits = [(a - now, b - now) for a, b in engine.pool.stats.waits[known:]]
        texts = (0, 0, 0) if trainee is None else trainee.texts
        its.say("served", stats, waits, texts)


class _Share(request_queue.RequestSource):
    """What is seen here of the learner's queue, as of the last look.

    A queue that was found empty is not asked again, see `remote.RemoteShare`.
    """

    def __init__(self, its: talk.Talk):
        self._talk = its
        self._prompts: frozenset[int] = frozenset()
        self.num_waiting = 1

    def take(self) -> types.Request | None:
        if not self.num_waiting:
            return None
        self._talk.say("take")
        request, self._prompts, self.num_waiting = self._talk.hear()
        return request

    def finish(self, request_id: int) -> bool:
        # The learner says so when it has the completion.
        return True

    def waits(self, prompt_id: int) -> bool:
        return prompt_id in self._prompts


def _ask_on(its: talk.Talk, num_tokens: int) -> None:
    """Tell that this worker lives; raise `Abandoned` where it is to go no further."""
    its.say("alive", num_tokens)
    (goes_on,) = its.hear()
    if not goes_on:
        raise failures.Abandoned
