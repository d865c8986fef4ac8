"""The learner's side of rollout workers that are processes of their own.

They come to the learner's first process, which has queue and coordinator. A thread here
stands for each: it hands requests on, and brings completions and signs of life back. So
a worker that dies or falls silent is lost as one of the learner's own devices is, and
others generate its requests. Who comes takes part from the next rollout on: those of
the beginning, those that were started again, and any more.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError, connection
from typing import Any

import jax

from tlt_jax import types
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.engine import requests as requests_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.workers import columns, records
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import distributed, failures, programs
from tlt_jax.runtime.transport import links, messages, ring, talk

# The laws by which a worker samples: the run's own, and that of its evaluations.
ROLLOUT, EVALUATION = "rollout", "evaluation"
# What a worker has to answer at once.
ANSWER_S = 60.0
_MOST_WORKERS = 1 << 16


class Distant:
    """A worker elsewhere.

    Attributes:
      number: its name.
      version: of the weights that it has; -1: none.
      is_ready: when it took them it had compiled its programs.
      pool: stands for its programs; of its statistics those of waiting are kept.
    """

    def __init__(self, number: int, its: talk.Talk):
        """Take the talk with one that was found to belong here."""
        self.number, self.talk, self.version = number, its, -1
        self.is_ready = False
        self.pool = programs.ProgramPool()
        self._busy = threading.Lock()

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
        with self._busy:
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
                    case "served", stats, waits:
                        self._note(waits)
                        if not goes_on:
                            raise failures.Abandoned
                        return stats
                    case other:
                        raise talk.TalkError(f"it says {other[:1]} where it decodes")

    def dismiss(self) -> None:
        """Let it end, at its next sign of life if a rollout was given up."""
        is_free = self._busy.acquire(timeout=ANSWER_S)
        with contextlib.suppress(talk.TalkError):
            if is_free:
                self.talk.say("end")
        self.talk.hang_up()

    def _note(self, waits: Sequence[tuple[float, float]]) -> None:
        """Keep when it waited for compilers, in seconds from now."""
        now = time.perf_counter()
        self.pool.stats.waits += [(now + a, now + b) for a, b in waits]
        self.pool.stats.waited_s += sum(b - a for a, b in waits)


class Door:
    """Where workers come in; who does not belong here is told why, or hung up on."""

    def __init__(self, meeting: distributed.Meeting, about: Mapping[str, str]):
        """Listen; `about` are code, libraries and settings, which all must share.

        Raises:
          failures.UserError: another program listens there.
        """
        self._meeting, self._about = meeting, dict(about)
        self._changed = threading.Condition()
        self._come: list[Distant] = []
        self._closed = False
        try:
            self._listener = connection.Listener(meeting.address, None, 64)
        except OSError as error:
            host, port = meeting.address
            raise failures.UserError(
                f"another program listens at {host}:{port} ({error.strerror}): the "
                "same command takes another port."
            ) from error
        threading.Thread(target=self._accept, daemon=True, name="door").start()

    def take(self, num: int = 0, within_s: float = 0.0) -> list[Distant]:
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

    def _accept(self) -> None:
        while not self._closed:
            try:
                caller = self._listener.accept()
            except OSError:
                # Closed by us, or by somebody who has changed their mind.
                continue
            threading.Thread(target=self._greet, args=(caller,), daemon=True).start()

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
                    self._come.append(Distant(number, its))
                    self._changed.notify_all()
                return
        its.hang_up()


class Team(workers_lib.Workers):
    """Separate workers, used as one by the learner's processes, of which none decodes.

    All of those call the methods together; the first one speaks with the workers.
    """

    def __init__(
        self,
        num: int,
        cfg: records.Config,
        group: distributed.Group,
        meeting: distributed.Meeting,
        about: Mapping[str, str],
        *,
        vocab_size: int,
        max_length: int,
    ):
        """Wait for nobody yet: `num` are expected before the first rollout.

        For `about` see `Door`; requests are checked for engines of texts of
        `max_length`.

        Raises:
          failures.UserError: see `Door`.
        """
        super().__init__((), cfg, group)
        self.num, self._silent_s = num, cfg.heartbeat_timeout_s
        self._meeting, self._sizes = meeting, (vocab_size, max_length)
        self._distant: dict[int, Distant] = {}
        self._is_begun, self._version, self._law = False, -1, ROLLOUT
        self._parts: Callable[[], Iterator[Any]] | None = None
        self._door = Door(meeting, about) if group.is_first else None

    @property
    def version(self) -> int:
        """Version of the target's weights in use."""
        return self._version

    @property
    def drafter_version(self) -> int:
        """Of none here."""
        return -1

    @property
    def pools(self) -> list[programs.ProgramPool]:
        """What stands for the workers' programs."""
        return [one.pool for one in self._distant.values()]

    def at_work(self) -> list[int]:
        """Return the numbers of the workers that are there.

        Those that still compile are left out where others do not.
        """
        found = self._distant.values()
        ready = [one.number for one in found if one.is_ready]
        return sorted(ready or self._distant)

    def place_of(self, worker: int) -> int:
        """All are driven by the first process."""
        return 0

    def lose(self, worker: int, reason: str) -> None:
        """Leave a worker out until it comes anew."""
        super().lose(worker, reason)
        one = self._distant.pop(worker, None)
        if one is not None:
            # It may be alive and find so that it is to come anew.
            one.talk.hang_up()

    def set_params(self, params: Callable[[], Iterator[Any]], version: int) -> None:
        """Give all workers these weights, and whoever comes before the next call.

        `params` makes their parts, see `weight_sync.ToOthers`; versions rise.
        """
        self._parts, self._version = params, version
        self.equip()

    def equip(self) -> None:
        """Let those in who have come; give weights to all who lack the newest.

        Raises:
          NoWorkersError: nobody is there, and nobody comes for a long time.
        """
        while self.group.first("workers", self._some_lack):
            self._give()

    def warm_up(self, wait: bool = True) -> None:
        """Workers compile by themselves, from their first weights on."""

    def release_caches(self) -> None:
        """Theirs are not on the learner's devices."""

    def close(self, failed: bool = False) -> None:
        """Say goodbye to all: their processes end, or where a run has failed, wait.

        One that has lost a process is begun again, and finds them then.
        """
        super().close()
        for one in self._distant.values():
            leave = one.talk.hang_up if failed else one.dismiss
            leave()
        if self._door is not None:
            self._door.close()

    def run(
        self,
        requests: Sequence[types.Request],
        seed: int,
        *,
        law: str = ROLLOUT,
        **options: Any,
    ) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
        """Generate a completion for every request; see `Workers.run`.

        Where all workers are lost it goes on with those that come anew. `on_completion`
        is called in the first process.
        """
        requests_lib.check(requests, *self._sizes)
        self._law = law
        done: dict[int, types.Completion] = {}
        stats, error, left = rollout_stats.RolloutStats(), None, list(requests)
        while left and error is None:
            self.equip()
            if self.group.is_first:
                rolling = workers_lib.Rollout(self, left, seed, **_all(options))
                error = self._through(rolling)
                done |= rolling.done
                stats = stats.join(rolling.stats)
                left = [r for r in left if r.request_id not in done]
            told = bool(left), error
            goes_on, error = self.group.first("rollout", lambda told=told: told)
            left = left if goes_on else []
        if error is not None:
            raise error
        own = columns.of_completions(list(done.values()))
        part, stats = self.group.first_large("completions", lambda: (own, stats))
        if not self.group.is_first:
            done = {one.request_id: one for one in columns.completions_of(part)}
        return [done[r.request_id] for r in requests], stats

    def serve(
        self, worker: int, source: request_queue.RequestSource, seed: int, **told: Any
    ) -> rollout_stats.RolloutStats:
        """Let a worker generate what a queue has; see `Distant.serve`."""
        return self._distant[worker].serve(source, seed, self._law, **told)

    def _through(self, rolling: workers_lib.Rollout) -> Exception | None:
        """Carry a rollout out; return what has ended the run."""
        distant = dict(self._distant)
        try:
            rolling.through()
        except workers_lib.NoWorkersError:
            # Who comes anew goes on.
            pass
        except failures.Abandoned as error:
            return error
        now = time.perf_counter()
        self.note_intervals(
            {
                number: [(a - now, b - now) for a, b in one.pool.stats.waits]
                for number, one in distant.items()
            }
        )
        return None

    def _some_lack(self) -> bool:
        """Let in who has come; say whether one of them lacks the newest weights."""
        missing = 0 if self._is_begun else self.num
        come = self._door.take(missing, self._silent_s)
        if not (come or self._distant):
            come = self._door.take(1, self._silent_s)
        for one in come:
            if one.number in self._distant:
                self.lose(one.number, "another has come in its place")
            self._distant[one.number] = one
            self.lost.pop(one.number, None)
        self._is_begun = True
        if not self._distant:
            raise workers_lib.NoWorkersError(
                f"no rollout worker has come within {self._silent_s:g} s "
                "(workers.timeout_s): see processes/ in the workdir for why."
            )
        return any(one.version != self._version for one in self._distant.values())

    def _give(self) -> None:
        """Send the newest weights round a ring of those that lack them.

        Who fails is lost. All processes of the learner take part in making them.
        """
        if not self.group.is_first:
            for _ in self._parts():
                pass
            return
        lacking = [
            one
            for _, one in sorted(self._distant.items())
            if one.version != self._version
        ]
        sending = _Sending(self._meeting, lacking, self._version, self._silent_s)
        for part in self._parts():
            sending.send(part)
            del part
        failed = sending.end()
        if not failed and all(one.version != self._version for one in lacking):
            # Nobody is gone: it would be the same again.
            failed = {one.number: "it cannot be reached by others" for one in lacking}
        for one, reason in failed.items():
            self.lose(one, reason)


class _Sending:
    """One transfer of weights to some workers; what fails is told at its end."""

    def __init__(
        self,
        meeting: distributed.Meeting,
        distant: Sequence[Distant],
        version: int,
        silent_s: float,
    ):
        """Join the workers in a ring, whose first member this process is."""
        self._distant, self._version = list(distant), version
        self._silent_s, self._failed = silent_s, dict[int, str]()
        self._num, secret = 1 + len(self._distant), secrets.token_bytes(32)
        self._ring: ring.Ring | None = None
        own = ring.Ring(0, self._num, meeting.host, secret, silent_s)
        addresses = [list(own.address)]
        for index, one in enumerate(self._distant, 1):
            self._tell(one, "weights", version, index, self._num, secret, silent_s)
            addresses += self._ask(one, ANSWER_S) or [None]
        for one in self._distant:
            self._tell(one, None if self._failed else addresses)
        if self._failed:
            own.close()
            return
        self._ring = own
        with self._guarded():
            own.connect([tuple(address) for address in addresses])

    def send(self, part: Any) -> None:
        """Send one part, a tree of NumPy arrays."""
        if self._ring is None:
            return
        pieces = messages.pack(jax.tree.leaves(part))
        size = messages.size(pieces)
        for one in self._distant:
            self._tell(one, "part", size)
        with self._guarded():
            self._ring.gather([size, *[0] * (self._num - 1)], pieces)

    def end(self) -> dict[int, str]:
        """Hear who has them now; return why others have failed."""
        if self._ring is not None:
            self._ring.close()
        for one in self._distant:
            self._tell(one, "whole")
        for one in self._distant:
            found = self._ask(one, self._silent_s)
            if found and found[0] == self._version:
                one.version, one.is_ready = found
        return self._failed

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Give the ring up where it breaks: who is gone does not answer at the end."""
        try:
            yield
        except ring.RingError:
            self._ring.close()
            self._ring = None

    def _tell(self, one: Distant, *values: Any) -> None:
        if one.number not in self._failed:
            try:
                one.talk.say(*values)
            except talk.TalkError as error:
                self._failed[one.number] = str(error)

    def _ask(self, one: Distant, within_s: float) -> tuple:
        """Hear what a worker answers; nothing: it has failed."""
        if one.number in self._failed:
            return ()
        try:
            return one.talk.hear(within_s)
        except talk.TalkError as error:
            self._failed[one.number] = str(error)
            return ()


def _all(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of a rollout."""
    names = ("expected_lengths", "on_completion", "on_call")
    return {name: options.get(name) for name in names}
