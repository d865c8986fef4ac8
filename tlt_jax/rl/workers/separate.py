"""The learner's side of rollout workers that are processes of their own.

They come to the learner's first process, which has queue and coordinator. A thread here
stands for each: it hands requests on, and brings completions and signs of life back. So
a worker that dies or falls silent is lost as one of the learner's own devices is, and
others generate its requests. Who comes in the midst of a rollout gets the weights and,
once it has compiled its programs, takes part: those that were started again, and any
more.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from tlt_jax import types
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.engine import requests as requests_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.workers import columns, distant, records, transfers
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import distributed, failures, programs
from tlt_jax.runtime.transport import links, talk

# In a rollout one looks so often who has come.
_LOOK_S = 0.1


class Team(workers_lib.Workers):
    """Separate workers, used as one by the learner's processes, of which none decodes.

    All of those call the methods together; the first one speaks with the workers.

    Attributes:
      traffic: bytes of weights and drafters, to and from workers.
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

        For `about` see `door.Door`; requests are checked for engines of texts of
        `max_length`.

        Raises:
          failures.UserError: see `distributed.open_door`.
        """
        super().__init__((), cfg, group)
        self.num, self._silent_s = num, cfg.heartbeat_timeout_s
        self._meeting, self._sizes = meeting, (vocab_size, max_length)
        self._distant: dict[int, distant.Distant] = {}
        # Of these the coordinator knows; the others' places are not free yet.
        self._taking_part: set[int] = set()
        self._before_door: list[distant.Distant] = []
        self._is_begun, self._version, self._law = False, -1, distant.ROLLOUT
        self._parts: Callable[[], Iterator[Any]] | None = None
        self._drafter: tuple[int, drafter.DrafterParams | None] = -1, None
        self.traffic = links.Traffic()
        self._door = distributed.open_door(meeting, about) if group.is_first else None

    @property
    def version(self) -> int:
        """Version of the target's weights in use."""
        return self._version

    @property
    def drafter_version(self) -> int:
        """Version of the drafter that workers have at their next rollout; -1: none."""
        return self._drafter[0]

    @property
    def pools(self) -> list[programs.ProgramPool]:
        """What stands for the workers' programs."""
        return [one.pool for one in self._there()]

    def texts(self) -> tuple[int, int, int]:
        """Texts that the workers keep, their bytes, and how many they have dropped."""
        found = [(0, 0, 0), *(one.texts for one in self._there())]
        return tuple(map(sum, zip(*found, strict=True)))

    def others(self) -> Any:
        """Return the target's weights but for its layers; all processes call this."""
        return next(self._parts())

    def at_work(self) -> list[int]:
        """Return the numbers of the workers of this rollout, or the last or next one.

        Those that still compile are left out at first where others do not.
        """
        if self._taking_part:
            return sorted(self._taking_part)
        ready = [one.number for one in self._there() if one.look()]
        return sorted(ready or self._distant)

    def place_of(self, worker: int) -> int:
        """All are driven by the first process."""
        return 0

    def lose(self, worker: int, reason: str) -> None:
        """Leave a worker out until it comes anew."""
        super().lose(worker, reason)
        self._taking_part.discard(worker)
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

    def offer_drafter(self, params: drafter.DrafterParams, version: int) -> None:
        """Let all workers speculate with these weights from their next rollout on."""
        self._drafter = version, params

    def equip(self) -> None:
        """Let those in who have come; give weights to all who lack the newest.

        Raises:
          NoWorkersError: nobody is there, and nobody comes for a long time.
        """
        while self.group.first("workers", self._some_lack):
            self._give()

    def warm_up(self, wait: bool = True) -> None:
        """Let workers compile, which they do by themselves from the first weights on.

        Who fails is found out when it is to generate.
        """
        for one in self._there() if wait else ():
            with contextlib.suppress(talk.TalkError):
                one.warm_up(self._silent_s)

    def release_caches(self) -> None:
        """Theirs are not on the learner's devices."""

    def close(self, failed: bool = False) -> None:
        """Say goodbye to all: their processes end, or where a run has failed, wait.

        One that has lost a process is begun again, and finds them then.
        """
        super().close()
        if self._door is not None:
            self._door.close()
            self._come()
        for one in (*self._there(), *self._before_door):
            leave = one.talk.hang_up if failed else one.dismiss
            leave()
        if self._door is not None:
            num_bytes = self.traffic.num_bytes
            logging.info("workers: %d bytes through this process", num_bytes)

    def run(
        self,
        requests: Sequence[types.Request],
        seed: int,
        *,
        law: str = distant.ROLLOUT,
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
            rolling = workers_lib.Rollout(
                self, left, seed, **_all(options), trains=law == distant.ROLLOUT
            )
            ended = self._begin(rolling) if self.group.is_first else None
            # All take part in making weights, for those who come meanwhile.
            while self.group.first("rollout", lambda e=ended: self._some_come(e)):
                self._give()
            if self.group.is_first:
                error = ended.result()
                done |= rolling.done
                stats = stats.join(rolling.stats)
                left = [r for r in left if r.request_id not in done]
            told = bool(left), error
            goes_on, error = self.group.first("left", lambda told=told: told)
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

    def train(
        self,
        worker: int,
        given: Iterable[Any],
        training: int,
        should_stop: Callable[[], bool],
        on_run: Callable[[], None],
        on_end: Callable[[str], bool],
    ) -> tuple[Any, Any] | None:
        """Let a worker train what it is `given` part by part; see `Distant.train`.

        A worker that has failed is lost.

        Returns:
          What it tells of it, and what it has learned, or None; None: it was to stop
          before it had all that it was given.

        Raises:
          talk.TalkError: it has failed.
        """
        one = self._distant.get(worker)
        if one is None:
            raise talk.TalkError("it is gone")
        told = [one], distant.TRAINING, training, self._silent_s, self.traffic
        try:
            with transfers.Sending(self._meeting, *told) as sending:
                is_all = True
                for part in given:
                    is_all = is_all and not should_stop()
                    if is_all:
                        sending.send(part)
                sending.hand_over(is_all)
                if not (is_all or sending.failed):
                    return None
                if one.has.get(distant.TRAINING) != training or sending.failed:
                    why = sending.failed.get(worker, "it cannot be reached by others")
                    raise talk.TalkError(why)
                report, size = one.train(should_stop, on_run, on_end)
                return report, sending.take(size) if size else None
        except talk.TalkError as error:
            self._give_up(one, f"while it trained the drafter: {error}")
            raise

    def _there(self) -> list[distant.Distant]:
        return list(self._distant.values())

    def _give_up(self, one: distant.Distant, reason: str) -> None:
        """Note that a worker is gone; from any thread."""
        one.is_gone = True
        one.talk.hang_up()
        c = self.coordination
        c.send(records.WorkerFailed(c.state.generation, one.number, reason))

    def _begin(self, rolling: workers_lib.Rollout) -> concurrent.futures.Future:
        """Carry a rollout out in a thread; gives what has ended the run, or None."""
        ended: concurrent.futures.Future[Exception | None] = concurrent.futures.Future()
        self._taking_part = set(self.at_work())

        def through():
            try:
                ended.set_result(self._through(rolling))
            # Whatever it is, it is raised where the rollout was begun.
            except BaseException as error:
                ended.set_exception(error)

        threading.Thread(target=through, daemon=True, name="rollout").start()
        return ended

    def _through(self, rolling: workers_lib.Rollout) -> Exception | None:
        """Carry a rollout out; return what has ended the run."""
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
                one.number: [(a - now, b - now) for a, b in one.pool.stats.waits]
                for one in self._there()
            }
        )
        return None

    def _some_come(self, ended: concurrent.futures.Future) -> bool:
        """Wait for a rollout's end, or until somebody lacks weights who has come."""
        while not ended.done():
            concurrent.futures.wait([ended], _LOOK_S)
            self._let_in()
            come = [o for o in self._there() if o.number not in self._taking_part]
            if come and not ended.done():
                if self._lacking(distant.WEIGHTS, self._version, come):
                    return True
                self._send_drafter(come)
                for one in come:
                    if one.look():
                        self._join(one)
        return False

    def _some_lack(self) -> bool:
        """Let in who has come; say whether one of them lacks the newest weights."""
        self._taking_part.clear()
        while True:
            for one in self._there():
                if one.is_gone:
                    self.lose(one.number, "it is gone")
            missing = 0 if self._is_begun else self.num
            self._let_in(missing)
            if not self._distant:
                self._let_in(1)
            self._is_begun = True
            if not self._distant:
                raise workers_lib.NoWorkersError(
                    f"no rollout worker has come within {self._silent_s:g} s "
                    "(workers.timeout_s): see processes/ in the workdir for why."
                )
            if self._lacking(distant.WEIGHTS, self._version, self._there()):
                return True
            if self._send_drafter(self._there()):
                return False

    def _let_in(self, num: int = 0) -> None:
        """Take those in who have come, once those are lost in whose place they come.

        Where `num` are wanted they are waited for, as long as others may be silent.
        """
        self._come(num)
        waiting, self._before_door = self._before_door, []
        for one in waiting:
            before = self._distant.get(one.number)
            if before is not None and one.number in self._taking_part:
                if not before.is_gone:
                    self._give_up(before, "another has come in its place")
                self._before_door.append(one)
                continue
            if before is not None:
                self.lose(one.number, "another has come in its place")
            self._distant[one.number] = one
            self.lost.pop(one.number, None)

    def _come(self, num: int = 0) -> None:
        """Note who has come; see `_let_in`."""
        come = self._door.take(num, self._silent_s if num else 0.0)
        self._before_door += [distant.Distant(number, its) for number, its in come]

    def _join(self, one: distant.Distant) -> None:
        """Let a worker take part in the rollout that runs."""
        c = self.coordination
        state = c.state
        known = state.worker(one.number)
        turn = 0 if known is None else known.round + 1
        c.send(records.WorkerCame(state.generation, one.number, turn))
        now = c.state.worker(one.number)
        if now is not None and now.round == turn:
            self._taking_part.add(one.number)

    def _lacking(
        self, what: str, number: int, found: Sequence[distant.Distant]
    ) -> list[distant.Distant]:
        return [one for one in found if one.has.get(what, -1) != number]

    def _give(self) -> None:
        """Send the newest weights round a ring of those that lack them.

        Who fails is lost. All processes of the learner take part in making them.
        """
        if self.group.is_first:
            self._send(distant.WEIGHTS, self._version, self._parts(), self._there())
        else:
            for _ in self._parts():
                pass

    def _send_drafter(self, found: Sequence[distant.Distant]) -> bool:
        """Give the newest drafter to those of them that lack it; true: all have it."""
        version, params = self._drafter
        given = iter([params])
        return params is None or self._send(distant.DRAFTER, version, given, found)

    def _send(
        self,
        what: str,
        number: int,
        parts: Iterator[Any],
        found: Sequence[distant.Distant],
    ) -> bool:
        """Send something to those of them that lack it, and lose who fails."""
        lacking = self._lacking(what, number, found)
        if not lacking:
            return True
        told = lacking, what, number, self._silent_s, self.traffic
        with transfers.Sending(self._meeting, *told) as sending:
            for part in parts:
                sending.send(jax.tree.leaves(part) if what == distant.WEIGHTS else part)
                del part
            sending.hand_over()
        failed = sending.failed
        if not failed and len(self._lacking(what, number, lacking)) == len(lacking):
            # Nobody is gone: it would be the same again.
            failed = {one.number: "it cannot be reached by others" for one in lacking}
        for one, reason in failed.items():
            self.lose(one, reason)
        return not self._lacking(what, number, lacking)


def _all(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of a rollout."""
    names = ("expected_lengths", "on_completion", "on_call")
    return {name: options.get(name) for name in names}
