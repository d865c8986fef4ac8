"""Scores completions in reward workers that a launcher has started, on any host.

A reward worker has the run's task, by the same settings, and a pool of one process, so
that limits and failures are those of any pool. It comes to every process of the run;
who dies or falls silent costs nothing but time, since others judge what it had. What
travels are an example and a text one way and what came of it the other: no code.
"""

import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence

from tlt_jax import config, types
from tlt_jax.rl.tasks import build, reward_pool, rewards
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime.transport import door, messages, talk
from tlt_jax.settings import sections

# How often a reward worker that still judges says so.
_BEAT_S = 5.0
# As long as for a rollout worker: a node may have to be found, a data set be read.
_COME_S = 900.0
_LOOK_S = 1.0


def pool_of(
    cfg: sections.Reward,
    score_fn: rewards.RewardFunction | rewards.WeightedSum,
    index: int,
    about: Mapping[str, str],
) -> reward_pool.Pool:
    """Make what judges for the process `index` of a run, here or elsewhere.

    Raises:
      ValueError, failures.UserError: see `reward_pool.RewardPool`, `SeparatePool`.
    """
    if cfg.placement == "colocated":
        return reward_pool.of_settings(cfg, score_fn, cfg.workers)
    return SeparatePool(score_fn, distributed.reward_meetings()[index], about)


def serve(
    run: config.RunConfig,
    meetings: Sequence[distributed.Meeting],
    about: Mapping[str, str],
) -> None:
    """Judge for the processes of a run, elsewhere, until it has ended.

    Raises:
      failures.UserError: they have other code, libraries or settings.
      ValueError: there is no such task or reward function.
    """
    task = build.build(run.task, reward=run.reward, eval_size=run.eval.num_prompts)
    with reward_pool.of_settings(run.reward, task.score, 1) as pool:
        Judge(meetings, about, pool).work()


class SeparatePool(reward_pool.Pool):
    """Lets reward workers judge that come to this process; see `reward_pool.Pool`."""

    def __init__(
        self,
        score_fn: rewards.RewardFunction | rewards.WeightedSum,
        meeting: distributed.Meeting,
        about: Mapping[str, str],
        silent_s: float = door.ANSWER_S,
    ):
        """Let them in who share `about`, see `door.Door`; they have `score_fn`, too.

        One that says nothing for `silent_s` is given up until it comes anew.

        Raises:
          failures.UserError: another program listens there.
        """
        super().__init__(score_fn)
        self._silent_s, self._left_s = silent_s, time.monotonic()
        self._is_end = True
        # By their numbers.
        self._there: dict[int, talk.Talk] = {}
        self._threads: list[threading.Thread] = []
        self._door = distributed.open_door(meeting, about)
        self._begin(self._let_in)

    def submit(self, example: types.Example, text: str) -> int:
        index = super().submit(example, text)
        try:
            messages.check_sendable((example, text))
        except messages.MessageError as error:
            # Of a thread that decodes nobody would hear it.
            self._break(
                f"example {example.example_id!r} cannot be sent to reward workers "
                f"({error}): set reward.placement=colocated, or keep its metadata to "
                "numbers, texts, lists and dictionaries."
            )
        return index

    def wait_until_ready(self) -> None:
        with self._changed:
            while not self._there:
                self._wait()

    def __exit__(self, kind: object, *_: object) -> None:
        # A run that has lost a process is begun again, and finds the workers then.
        self._is_end = kind is None
        self.close()

    def close(self) -> None:
        super().close()
        self._door.close()
        # An idle one hears that this is the end, any other finds that it is over.
        for _ in self._threads:
            self._jobs.put(None)
        until_s = time.monotonic() + _LOOK_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        for its in list(self._there.values()):
            its.hang_up()

    def _begin(self, work, *arguments) -> None:
        thread = threading.Thread(
            target=work, args=arguments, daemon=True, name="reward"
        )
        self._threads.append(thread)
        thread.start()

    def _wait(self, longest_s: float | None = None) -> None:
        if not self._there and time.monotonic() - self._left_s > _COME_S:
            self._broken = (
                f"no reward worker was there for {_COME_S:g} s: see processes/ in the "
                "workdir for why."
            )
        super()._wait(_LOOK_S if longest_s is None else longest_s)

    def _let_in(self) -> None:
        while not self._closed:
            for number, its in self._door.take(1, _LOOK_S):
                with self._changed:
                    before = self._there.pop(number, None)
                    self._there[number] = its
                    self._changed.notify_all()
                if before is not None:
                    before.hang_up()
                self._begin(self._drive, number, its)

    def _drive(self, number: int, its: talk.Talk) -> None:
        """Hand one reward worker what is to be judged: a thread's whole life."""
        with contextlib.suppress(talk.TalkError):
            while not self._closed and (job := self._jobs.get()) is not None:
                index, example, text = job
                try:
                    outcome = self._ask(its, example, text)
                except talk.TalkError:
                    # Others judge it, or this one when it has come anew.
                    self._jobs.put(job)
                    raise
                self._put(index, outcome)
            if self._is_end:
                its.say("end")
        with self._changed:
            if self._there.get(number) is its:
                del self._there[number]
                self._left_s = time.monotonic()
        its.hang_up()

    def _ask(
        self, its: talk.Talk, example: types.Example, text: str
    ) -> reward_pool.Scored:
        its.say("judge", example, text)
        while True:
            match its.hear(self._silent_s):
                case ("alive",):
                    continue
                case "judged", reward_pool.Scored() as outcome:
                    return outcome
                case other:
                    raise talk.TalkError(f"it says {other[:1]} where it judges")


class Judge:
    """A reward worker: serves the processes of a run until they say it has ended."""

    def __init__(
        self,
        meetings: Sequence[distributed.Meeting],
        about: Mapping[str, str],
        pool: reward_pool.RewardPool,
    ):
        """Judge by a pool that does nothing else, for those at the meetings."""
        self._meetings = list(meetings)
        self._about, self._pool = dict(about), pool
        self._judging = concurrent.futures.ThreadPoolExecutor(1, "judging")
        self._ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def work(self) -> None:
        """Serve until the end of the run.

        Raises:
          failures.UserError: the run has other code, libraries or settings, or the
            function cannot be had here.
        """
        self._pool.wait_until_ready()
        for meeting in self._meetings:
            threading.Thread(target=self._serve, args=(meeting,), daemon=True).start()
        for _ in self._meetings:
            error = self._ends.get()
            if error is not None:
                raise error

    def _serve(self, meeting: distributed.Meeting) -> None:
        """Serve one process of the run after another, at one place."""
        error = None
        try:
            while not self._follow(meeting):
                pass
        # The main thread raises it.
        except Exception as met:
            error = met
        self._ends.put(error)

    def _follow(self, meeting: distributed.Meeting) -> bool:
        """Do what a process says; true: the run has ended."""
        its, other = door.enter(
            meeting.address, meeting.secret, meeting.worker, self._about
        )
        if other:
            raise failures.UserError(
                f"reward worker {meeting.worker} has another {other} than the learner: "
                "start all processes with the same command, code and libraries."
            )
        with contextlib.closing(its), contextlib.suppress(talk.TalkError):
            while True:
                match its.hear():
                    case "judge", types.Example() as example, str() as text:
                        its.say("judged", self._judged(its, example, text))
                    case ("end",):
                        return True
                    case told:
                        raise talk.TalkError(f"the learner says {told[:1]}")
        return False

    def _judged(
        self, its: talk.Talk, example: types.Example, text: str
    ) -> reward_pool.Scored:
        """Judge, after what others have asked for, and say meanwhile that it lives."""
        judging = self._judging.submit(self._pool.score, [(example, text)])
        while True:
            try:
                return judging.result(_BEAT_S).items[0]
            except concurrent.futures.TimeoutError:
                its.say("alive")
