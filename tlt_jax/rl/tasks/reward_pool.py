"""Scores completions in worker processes, each call under a time limit.

A reward function is foreign code: it may raise, hang (also where no Python signal is
seen, as in a regular expression), kill its process or return nonsense. Each worker is a
fresh Python process, driven by one thread of ours that waits for its answer, and kills
and replaces it when it must. The workers are started with `subprocess`, not forked and
not through `multiprocessing`: a process that has started JAX must not be forked, and
`multiprocessing` imports the caller's main module again in every worker, which for a
training run means JAX and everything else. JAX in a reward function runs on the CPU, so
that it does not take the accelerator from the training.
"""

import dataclasses
import json
import math
import numbers
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, Literal

import numpy as np

from tlt_jax import types
from tlt_jax.rl.tasks import rewards

Status = Literal["ok", "error", "timeout", "crashed", "nonfinite"]

_FAILURES: tuple[Status, ...] = ("error", "timeout", "crashed", "nonfinite")
# For importing what the function needs; afterwards it is told to close down.
_START_LIMIT_S = 120.0
# A worker ends itself this long after its time limit, should nobody be left to do it.
_GRACE_S = 10.0
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tlt_jax.rl.tasks import reward_pool; reward_pool.serve(int(sys.argv[2]))"
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """One call's outcome.

    Attributes:
      reward: finite; the pool's `failure_reward` unless the status is `ok`.
      status: `ok`; `error`: it raised; `timeout`: it ran too long; `crashed`: its
        process ended; `nonfinite`: it returned no finite number.
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
    """What `RewardPool.gather` returns.

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
        """`[n] float32`, all finite."""
        return np.array([item.reward for item in self.items], np.float32)

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


class RewardPool:
    """Scores (example, text) pairs in parallel; failures become values.

    `submit` may be called while the rollout runs, by several threads; `gather` waits
    for what was submitted. The pool is a context manager.
    """

    def __init__(
        self,
        score_fn: rewards.RewardFunction | rewards.WeightedSum,
        num_workers: int,
        timeout_s: float = 10.0,
        *,
        failure_reward: float = 0.0,
    ):
        """Starts the workers, without waiting for them.

        Args:
          score_fn: called as `score_fn(example, text)`. With workers it is pickled, so
            it must be importable: a function of a module, or a task's `score`. Of a
            `WeightedSum` each function's value is kept beside the sum, which is a
            failure if one of them fails.
          num_workers: at least 0; with 0 `gather` calls the function in this process,
            with no time limit and no protection from crashes: for the fast, built-in
            verifiers.
          timeout_s: limit of one call, above 0; starting a worker does not count.
          failure_reward: reward of a call that failed, finite.

        Raises:
          ValueError: `score_fn` cannot be pickled.
        """
        self._score_fn = score_fn
        several = isinstance(score_fn, rewards.WeightedSum) and len(score_fn.names) > 1
        self._names = score_fn.names if several else ()
        self._failure_reward = failure_reward
        self._changed = threading.Condition()
        self._pending: list[tuple[types.Example, str]] = []
        self._done: dict[int, Scored] = {}
        self._broken: str | None = None
        self._jobs: queue.SimpleQueue[tuple[int, types.Example, str] | None]
        self._jobs = queue.SimpleQueue()
        self._closed = False
        self._in_process = not num_workers
        payload = b"" if self._in_process else _pickled(score_fn)
        self._workers = []
        for _ in range(num_workers):
            worker = _Worker(payload, timeout_s)
            thread = threading.Thread(
                target=self._drive, args=(worker,), daemon=True, name="reward"
            )
            self._workers.append((worker, thread))
            thread.start()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, example: types.Example, text: str) -> int:
        """Queues one call and returns its index in the next `gather`."""
        if self._closed:
            raise RuntimeError("the reward pool is closed: make another one.")
        with self._changed:
            index = len(self._pending)
            self._pending.append((example, text))
            if not self._in_process:
                self._jobs.put((index, example, text))
        return index

    def gather(self) -> Scores:
        """Waits for all calls submitted since the last `gather`.

        Every call ends: by itself, or by the time limit.

        Raises:
          RuntimeError: a worker could not start, e.g. because the function cannot be
            imported there.
        """
        start = time.perf_counter()
        if self._in_process:
            for index, (example, text) in enumerate(self._pending):
                self._done[index] = self._finish(_call(self._score_fn, example, text))
        with self._changed:
            while len(self._done) < len(self._pending):
                if self._broken is not None:
                    raise RuntimeError(self._broken)
                self._changed.wait()
            items = tuple(self._done[index] for index in range(len(self._pending)))
            self._pending, self._done = [], {}
        return Scores(items, time.perf_counter() - start, self._names)

    def score(self, pairs: Iterable[tuple[types.Example, str]]) -> Scores:
        """Submits all pairs and gathers them, with any submitted before."""
        for example, text in pairs:
            self.submit(example, text)
        return self.gather()

    def close(self) -> None:
        """Ends the workers at once; calls not gathered are lost."""
        self._closed = True
        for _ in self._workers:
            self._jobs.put(None)
        for worker, _ in self._workers:
            worker.close()
        for _, thread in self._workers:
            thread.join()

    def _finish(self, scored: Scored) -> Scored:
        if scored.status == "ok":
            return scored
        return dataclasses.replace(scored, reward=self._failure_reward)

    def _drive(self, worker: "_Worker") -> None:
        """Runs one worker: a thread's whole life."""
        try:
            worker.start()
            while not self._closed and (job := self._jobs.get()) is not None:
                index, example, text = job
                outcome = self._finish(worker.call(example, text))
                with self._changed:
                    self._done[index] = outcome
                    self._changed.notify_all()
                worker.start()
        except _StartError as error:
            if not self._closed:
                with self._changed:
                    self._broken = str(error)
                    self._changed.notify_all()
        finally:
            worker.close()


class _StartError(RuntimeError):
    """A worker did not come up."""


class _Worker:
    """One process, replaced after it was killed or died."""

    def __init__(self, score_fn: bytes, timeout_s: float):
        self._score_fn, self._timeout_s = score_fn, timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._pipe: Any = None
        self._closed = False

    def start(self) -> None:
        """Starts a process if there is none that lives, and waits until it is ready."""
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        paths = json.dumps(list(map(str, sys.path)))
        ours, theirs = connection.Pipe()
        with self._lock:
            if self._closed:
                raise _StartError("the pool is closed")
            self._pipe = ours
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, paths, f"{theirs.fileno()}"],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # What a reward prints must not mix with a command's output.
                # A group of its own, so that what the function starts ends with it,
                # and Ctrl-C reaches the driver only.
                start_new_session=True,
            )
        theirs.close()
        failure: str | None = "it does not answer"
        try:
            ours.send((self._score_fn, self._timeout_s + _GRACE_S))
            if ours.poll(_START_LIMIT_S):
                failure = ours.recv()
        except (EOFError, OSError):
            failure = f"it ended ({self._fate()})"
        if failure is not None:
            self._stop()
            raise _StartError(f"a reward worker cannot start: {failure}")

    def call(self, example: types.Example, text: str) -> Scored:
        """Scores one pair within the time limit."""
        start = time.perf_counter()
        try:
            self._pipe.send((example, text))
            if self._pipe.poll(self._timeout_s):
                return self._pipe.recv()
        except (EOFError, OSError):
            spent = time.perf_counter() - start
            message = f"the reward function ended its process ({self._fate()})"
            return Scored(0.0, "crashed", message, spent)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            message = f"example {example.example_id!r} cannot be pickled: {error}"
            return Scored(0.0, "error", message, 0.0)
        self._stop()
        message = f"the reward function took more than timeout_s={self._timeout_s:g}"
        return Scored(0.0, "timeout", message, time.perf_counter() - start)

    def close(self) -> None:
        """Ends the process for good; may be called by another thread."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            _kill(process)

    def _fate(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._pipe.close()
            self._process = None


def _kill(process: subprocess.Popen) -> None:
    """Ends a worker with whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


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


def serve(fileno: int) -> None:
    """Runs in a worker process: receives the function, then scores until the end."""
    pipe = connection.Connection(fileno)
    try:
        payload, limit_s = pipe.recv()
        score_fn = pickle.loads(payload)
    except Exception as error:  # Whatever importing foreign code raises.
        pipe.send(_describe(error))
        return
    pipe.send(None)
    while True:
        try:
            example, text = pipe.recv()
        except EOFError:
            return
        # Ends this process even where Python code is never reached.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        outcome = _call(score_fn, example, text)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        pipe.send(outcome)


def _call(
    score_fn: Callable[[types.Example, str], Any], example: types.Example, text: str
) -> Scored:
    """Returns the outcome of one call, 0 as a failure's reward; never raises."""
    start = time.perf_counter()
    try:
        scored = _check(score_fn(example, text))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Foreign code; SystemExit is one of them.
        scored = Scored(0.0, "error", _describe(error), 0.0)
    return dataclasses.replace(scored, scoring_s=time.perf_counter() - start)


def _check(value: Any) -> Scored:
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
    if not math.isfinite(total):
        return _nonfinite("s' weighted sum", total)
    return Scored(total, "ok", "", 0.0, parts if len(parts) > 1 else {})


def _finite(value: Any) -> float | None:
    """Returns a finite number as it is, and None of anything else."""
    if isinstance(value, numbers.Real | np.bool_) or (
        not isinstance(value, str | bytes) and getattr(value, "shape", None) == ()
    ):
        reward = float(value)
        if math.isfinite(reward):
            return reward
    return None


def _nonfinite(which: str, value: Any) -> Scored:
    message = (
        f"the reward function{which} returned {repr(value)[:80]} of type "
        f"{type(value).__name__}: a finite number is accepted"
    )
    return Scored(0.0, "nonfinite", message, 0.0)


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"[:500]
