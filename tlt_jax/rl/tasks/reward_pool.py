"""Scores completions in worker processes, each call under limits of time and memory.

A reward function is foreign code, see `foreign.process`. Each worker is a process of
its own, driven by one thread of ours that waits for its answer; whatever goes wrong is
the outcome of one call.
"""

import dataclasses
import math
import numbers
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tlt_jax import types
from tlt_jax.foreign import process, serving
from tlt_jax.rl.tasks import rewards
from tlt_jax.runtime import failures
from tlt_jax.settings import sections

# Its index, and what is judged.
Job = tuple[int, types.Example, str]
Status = Literal["ok", "error", "timeout", "crashed", "nonfinite"]

_FAILURES: tuple[Status, ...] = ("error", "timeout", "crashed", "nonfinite")
_ENTRY = "tlt_jax.rl.tasks.reward_pool:scorer"
_CLOSED = "the reward pool is closed: make another one."
# A day: whoever waits longer for one reward has lost it.
_LONGEST_S = 86_400.0
# Optimizers compute in float32: a larger reward is infinite there.
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Scored:
    """One call's outcome.

    Attributes:
      reward: finite; the pool's `failure_reward` unless the status is `ok`.
      status: `ok`; `error`: it raised; `timeout`: it ran too long; `crashed`: its
        process ended, or wrote into the link to ours; `nonfinite`: it returned no
        number that is finite in float32.
      message: what happened; empty if ok.
      scoring_s: how long the call took.
      parts: what each of several functions said, unweighted, by its name in the record;
        empty of one function, and unless ok.
    """

    reward: float
    status: Status
    message: str
    scoring_s: float
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `Pool.gather` returns.

    Attributes:
      items: in the order of submission.
      wait_s: how long `gather` waited: what scoring adds to a step.
      names: of the functions, where there are several.
    """

    items: tuple[Scored, ...]
    wait_s: float
    names: tuple[str, ...] = ()

    @property
    def rewards(self) -> np.ndarray:
        """`[n] float64`, all finite, in float32, too."""
        return np.array([item.reward for item in self.items], np.float64)

    @property
    def num_failed(self) -> int:
        """Calls whose status is not `ok`."""
        return sum(item.status != "ok" for item in self.items)

    def metrics(self) -> dict[str, float | None]:
        """Returns waiting and scoring time (all calls, the longest) and failures.

        Of several functions also the mean that each gave where no call failed; None
        where all did.
        """
        spent = [item.scoring_s for item in self.items]
        statuses = [item.status for item in self.items]
        return {
            "time/reward_s": self.wait_s,
            "reward/scoring_s": sum(spent),
            "reward/scoring_max_s": max(spent, default=0.0),
            "reward/num_failed": self.num_failed,
            **{f"reward/num_{status}": statuses.count(status) for status in _FAILURES},
            **{f"reward/{name}": self._mean(name) for name in self.names},
        }

    def first_failure(self) -> str:
        """Returns the message of the first call that failed, or nothing."""
        return next((item.message for item in self.items if item.message), "")

    def _mean(self, name: str) -> float | None:
        values = [item.parts[name] for item in self.items if item.parts]
        return math.fsum(values) / len(values) if values else None


def joined(parts: Sequence[Scores]) -> Scores:
    """Puts scores of several processes together, one part behind the other."""
    items = tuple(item for part in parts for item in part.items)
    return Scores(items, max(part.wait_s for part in parts), parts[0].names)


class Pool:
    """Scores (example, text) pairs in parallel; failures become values.

    `submit` may be called while the rollout runs, by several threads; `gather` waits
    for what was submitted. A pool is a context manager. `RewardPool` judges in
    processes of its host, `reward_workers.SeparatePool` in those of a launcher.
    """

    def __init__(self, score_fn: rewards.RewardFunction | rewards.WeightedSum):
        """Nothing is submitted yet; of the function only its parts' names count."""
        several = isinstance(score_fn, rewards.WeightedSum) and len(score_fn.names) > 1
        self._names = score_fn.names if several else ()
        self._changed = threading.Condition()
        self._pending: list[tuple[types.Example, str]] = []
        self._done: dict[int, Scored] = {}
        self._broken: str | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, example: types.Example, text: str) -> int:
        """Queues one call and returns its index in the next `gather`."""
        if self._closed:
            raise RuntimeError(_CLOSED)
        with self._changed:
            index = len(self._pending)
            self._pending.append((example, text))
            self._jobs.put((index, example, text))
        return index

    def gather(self) -> Scores:
        """Waits for all calls submitted since the last `gather`.

        Every call ends: by itself, or by the time limit.

        Raises:
          failures.UserError: nobody is left who could judge.
        """
        start = time.perf_counter()
        self._help()
        with self._changed:
            while len(self._done) < len(self._pending):
                self._wait()
            items = tuple(self._done[index] for index in range(len(self._pending)))
            self._pending, self._done = [], {}
        return Scores(items, time.perf_counter() - start, self._names)

    def score(self, pairs: Iterable[tuple[types.Example, str]]) -> Scores:
        """Submits all pairs and gathers them, with any submitted before."""
        for example, text in pairs:
            self.submit(example, text)
        return self.gather()

    def wait_until_ready(self) -> None:
        """Waits until completions can be judged, so that none waits for it later.

        Raises:
          failures.UserError: it will not come to that.
        """

    def close(self) -> None:
        """Ends it at once; calls not gathered are lost."""
        self._closed = True
        self._break(_CLOSED)

    def _help(self) -> None:
        """Does what `gather` itself has to do."""

    def _wait(self, longest_s: float | None = None) -> None:
        """Waits for a change, unless there will be none."""
        if self._broken is not None:
            raise failures.UserError(self._broken)
        self._changed.wait(longest_s)

    def _put(self, index: int, outcome: Scored) -> None:
        with self._changed:
            self._done[index] = outcome
            self._changed.notify_all()

    def _break(self, message: str) -> None:
        with self._changed:
            self._broken = self._broken or message
            self._changed.notify_all()


class RewardPool(Pool):
    """Judges in worker processes of this host; see `Pool`."""

    def __init__(
        self,
        score_fn: rewards.RewardFunction | rewards.WeightedSum,
        num_workers: int,
        timeout_s: float = 10.0,
        *,
        memory_mb: int = 0,
        failure_reward: float = 0.0,
    ):
        """Starts the workers, without waiting for them.

        Args:
          score_fn: called as `score_fn(example, text)`. With workers it is pickled, so
            it must be importable: a function of a module, or a task's `score`. Of a
            `WeightedSum` each function's value is kept beside the sum, which is a
            failure if one of them fails.
          num_workers: at least 0; with 0 `gather` calls the function in this process,
            with no limits and no protection from crashes: for the fast, built-in
            verifiers.
          timeout_s: limit of one call, above 0, at most a day; starting a worker does
            not count.
          memory_mb: limit of a worker's memory in MiB, see `process.Limits`; 0: none.
          failure_reward: reward of a call that failed, finite in float32.

        Raises:
          ValueError: `score_fn` cannot be pickled, or another argument is out of range.
        """
        _check(num_workers, timeout_s, memory_mb, failure_reward)
        super().__init__(score_fn)
        self._score_fn = score_fn
        self._failure_reward = failure_reward
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        payload = _pickled(score_fn) if num_workers else b""
        self._num_ready = 0
        self._workers = []
        limits = process.Limits(timeout_s, memory_mb << 20)
        for _ in range(num_workers):
            worker = process.Process("a reward worker", _ENTRY, payload, limits)
            thread = threading.Thread(
                target=self._drive, args=(worker,), daemon=True, name="reward"
            )
            self._workers.append((worker, thread))
            thread.start()

    def wait_until_ready(self) -> None:
        """Waits for the workers to start, so that none fails after the first rollout.

        Raises:
          failures.UserError: one cannot, e.g. because the function cannot be imported
            there.
        """
        with self._changed:
            while self._num_ready < len(self._workers):
                self._wait()

    def close(self) -> None:
        self._closed = True
        for _ in self._workers:
            self._jobs.put(None)
        for worker, _ in self._workers:
            worker.kill()
        for _, thread in self._workers:
            thread.join()
        super().close()

    def _help(self) -> None:
        """Judges right here, if there are no workers."""
        while not self._workers and not self._jobs.empty():
            job = index, example, text = self._jobs.get()
            try:
                outcome = _call(self._score_fn, example, text)
            except KeyboardInterrupt:
                self._jobs.put(job)
                raise
            self._put(index, self._finish(outcome))

    def _finish(self, scored: Scored) -> Scored:
        if scored.status == "ok":
            return scored
        return dataclasses.replace(scored, reward=self._failure_reward)

    def _drive(self, worker: process.Process) -> None:
        """Runs one worker: a thread's whole life."""
        try:
            worker.start()
            with self._changed:
                self._num_ready += 1
                self._changed.notify_all()
            while not self._closed and (job := self._jobs.get()) is not None:
                index, example, text = job
                self._put(index, self._finish(self._ask(worker, example, text)))
                worker.start()  # Now, if it has failed: the next call need not wait.
        except process.StartError as error:
            if self._closed:
                return
            self._break(
                f"{error}: correct the reward function's module, or judge in the run's "
                "own process by reward.workers=0."
            )
        except BaseException as error:  # Nobody else would hear of it.
            self._break(f"a reward worker is lost: {serving.describe(error)}")
            raise
        finally:
            worker.close()

    def _ask(
        self, worker: process.Process, example: types.Example, text: str
    ) -> Scored:
        """Scores one pair within the limits."""
        start = time.perf_counter()
        try:
            scored = Scored(**worker.call((example, text)))
            if scored.message.startswith("MemoryError"):
                what = f"{scored.message}; there is reward.memory_mb={self._memory_mb}"
                return dataclasses.replace(scored, message=what)
            return scored
        except process.TooLongError:
            status: Status = "timeout"
            message = (
                f"the reward function took more than timeout_s={self._timeout_s:g}"
            )
        except process.SpoiltError:
            status = "crashed"
            message = "the reward function wrote into the link of its process to ours"
        except process.EndedError as error:
            status, message = (
                "crashed",
                f"the reward function ended its process ({error})",
            )
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            status = "error"
            message = f"example {example.example_id!r} cannot be pickled: {error}"
        return Scored(0.0, status, message, time.perf_counter() - start)


def of_settings(
    cfg: sections.Reward,
    score_fn: rewards.RewardFunction | rewards.WeightedSum,
    num_workers: int,
) -> RewardPool:
    """Makes a pool of so many processes; `ValueError`: see `RewardPool`."""
    return RewardPool(
        score_fn,
        num_workers,
        cfg.timeout_s,
        memory_mb=cfg.memory_mb,
        failure_reward=cfg.failure_reward,
    )


def _check(
    num_workers: int, timeout_s: float, memory_mb: int, failure_reward: float
) -> None:
    if num_workers < 0:
        raise ValueError(
            f"num_workers={num_workers}: give at least 1, or 0 to judge right here."
        )
    if not 0 < timeout_s <= _LONGEST_S:
        raise ValueError(
            f"timeout_s={timeout_s} is out of range: above 0, at most {_LONGEST_S:g}."
        )
    if memory_mb < 0:
        raise ValueError(f"memory_mb={memory_mb}: give at least 1, or 0 for no limit.")
    if _finite(failure_reward) is None:
        raise ValueError(
            f"failure_reward={failure_reward} is not finite (in float32): give another."
        )


def _pickled(score_fn: Callable[[types.Example, str], Any]) -> bytes:
    remedy = (
        "put the function into a module and name it package.module:function, or use "
        "num_workers=0"
    )
    try:
        payload = pickle.dumps(score_fn)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"score_fn={score_fn!r} cannot be sent to workers ({error}): {remedy}."
        ) from error
    if b"__main__" in payload:
        raise ValueError(
            f"score_fn={score_fn!r} is defined in the main program or a notebook, "
            f"which workers do not import: {remedy}."
        )
    return payload


def scorer(payload: bytes) -> Callable[[tuple[types.Example, str]], dict[str, Any]]:
    """Returns what a worker process does with a job; see `process.Process`."""
    score_fn = pickle.loads(payload)

    def score(job: tuple[types.Example, str]) -> dict[str, Any]:
        return dataclasses.asdict(_call(score_fn, *job))

    return score


def _call(
    score_fn: Callable[[types.Example, str], Any], example: types.Example, text: str
) -> Scored:
    """Returns the outcome of one call, 0 as a failure's reward; never raises."""
    start = time.perf_counter()
    try:
        with serving.forks_end_here():
            scored = _checked(score_fn(example, text))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Foreign code; SystemExit is one of them.
        scored = Scored(0.0, "error", serving.describe(error), 0.0)
    return dataclasses.replace(scored, scoring_s=time.perf_counter() - start)


def _checked(value: Any) -> Scored:
    if not isinstance(value, rewards.Verdict):
        reward = _finite(value)
        return _nonfinite("", value) if reward is None else Scored(reward, "ok", "", 0)
    parts = {}
    for name, one in zip(value.names, value.values, strict=True):
        reward = _finite(one)
        if reward is None:
            return _nonfinite(f" {name}", one)
        parts[name] = reward
    weighted = zip(parts.values(), value.weights, strict=True)
    total = sum(reward * weight for reward, weight in weighted)
    if _finite(total) is None:
        return _nonfinite("s' weighted sum", total)
    return Scored(total, "ok", "", 0.0, parts if len(parts) > 1 else {})


def _finite(value: Any) -> float | None:
    """Returns a number that is finite in float32 as it is, and None of all else."""
    if isinstance(value, numbers.Real | np.bool_) or (
        not isinstance(value, str | bytes) and getattr(value, "shape", None) == ()
    ):
        try:
            reward = float(value)
        except OverflowError:  # An integer beyond float64.
            return None
        if abs(reward) <= _LARGEST:  # Which NaN is not, either.
            return reward
    return None


def _nonfinite(which: str, value: Any) -> Scored:
    try:
        shown = serving.printable(repr(value)[:80])
    except ValueError:  # An integer of thousands of digits.
        shown = "one beyond all bounds"
    message = (
        f"the reward function{which} returned {shown} of type "
        f"{type(value).__name__}: a finite number (in float32) is accepted"
    )
    return Scored(0.0, "nonfinite", message, 0.0)
