"""The coordinator's home: one state, a lock, a clock, mailboxes for commands.

Threads give events with `send`. The rollout's driver, which owns engines and queue:

    c.begin(workers)
    while (command := c.next_command()) is not None:
        Generate: start the worker's thread, which sends WorkerAlive between decode
            calls and WorkerDone or WorkerFailed at its end
        ReturnRequests: give them back to the queue; send RequestsReturned
        EndRollout: leave; Abort: raise

The trainer:

    while not c.closed:
        train = c.next_training(); if it is None: continue
        c.send(TrainingRuns(train.training, train.revision))
        while not c.should_stop(train.training):
            take a step; have more workers joined? c.next_training(0) tells, as above
        if c.may_publish(train.training): give the drafter to the engines
        c.send(TrainingStopped(train.training)), or TrainingFailed after an error

A run of several processes has one, in process 0, whose drivers and trainers name their
`place`: their process. Whoever waits here takes in the passage of time, so time-outs
need no further thread.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tlt_jax.rl.workers import coordinator, records

_LONGEST_WAIT_S = 1.0
_T = TypeVar("_T")


class Coordination:
    """Holds the coordinator's state for the threads of a process.

    Attributes:
      state: what is known now; a frozen record, read without the lock.
      closed: `close` was called: threads shall end.
    """

    def __init__(
        self, cfg: records.Config, clock: Callable[[], float] = time.monotonic
    ):
        """Start without a rollout; `clock` gives seconds and never goes back."""
        self._cfg, self._clock = cfg, clock
        self._changed = threading.Condition()
        self.state = records.State(now_s=clock())
        # Commands for the driver of each place.
        self._for_rollout: dict[int, collections.deque[records.Command]]
        self._for_rollout = collections.defaultdict(collections.deque)
        self._places = {0}
        # By place; the latest only: it names all members.
        self._for_trainer: dict[int, records.Train] = {}
        # The last training that the trainer has heard of.
        self._heard_of = 0
        self.closed = False

    def begin(
        self, workers: Sequence[int], places: Sequence[int] = (), trains: bool = True
    ) -> int:
        """Ask for the next rollout; return its generation, to be given back in events.

        It begins, with a `Generate` for each worker, at once or when the training that
        still runs has ended. A rollout that has not ended is given up. `places` are the
        processes of the workers; empty: all are of process 0. Those who wait train the
        drafter where it `trains`.

        Raises:
          ValueError: `workers` is empty or names one twice.
        """
        with self._changed:
            state = self.state
            generation = 1 + (state.asked or state).generation
            # What the last rollout's driver has left, is of no use to this one.
            self._for_rollout.clear()
            self._places = {0, *places}
            self._handle(
                records.RolloutAsked(generation, tuple(workers), tuple(places), trains)
            )
        return generation

    def send(self, event: object) -> None:
        """Take in an event; its time is the time of this call."""
        with self._changed:
            self._handle(event)

    def next_command(
        self, timeout_s: float | None = None, place: int = 0
    ) -> records.Command | None:
        """Wait for the next command to the rollout's driver in process `place`.

        `Generate` goes to the worker's process, `ReturnRequests` to process 0, the
        others to all.

        Returns:
          The oldest command not taken yet; None after the time, or once closed.
        """

        def take():
            waiting = self._for_rollout[place]
            return waiting.popleft() if waiting else None

        return self._wait(take, timeout_s)

    def next_training(
        self, timeout_s: float | None = None, place: int = 0
    ) -> records.Train | None:
        """Wait for a training in process `place` to begin, or for more to join it.

        That it shall end is told by `should_stop`. A training that was called off
        before it was taken here never shows up. A `timeout_s` of 0 just looks.

        Returns:
          The newest `Train`, each once; None after the time, or once closed.
        """

        def take():
            command = self._for_trainer.pop(place, None)
            if command is not None:
                self._heard_of = command.training
            return command

        return self._wait(take, timeout_s)

    def should_stop(self, training: int) -> bool:
        """Say whether the trainer must not begin another step; costs no lock."""
        return self.closed or not coordinator.may_train(self.state, training)

    def wait_to_stop(self, training: int, timeout_s: float) -> bool:
        """Wait for so long until `should_stop`; return what it says then."""
        self._wait(lambda: self.should_stop(training) or None, timeout_s)
        return self.should_stop(training)

    def may_publish(self, training: int) -> bool:
        """Say whether the training's drafter counts; ask before `TrainingStopped`."""
        return coordinator.may_publish(self.state, training)

    def timeline(self) -> tuple[records.Interval, ...]:
        """Return what each worker did, times counted from the rollout's begin."""
        state = self.state
        return coordinator.timeline(state, state.began_s)

    def close(self) -> None:
        """Let every thread that waits go, and the trainer stop."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _handle(self, event: object) -> None:
        self.state, commands = coordinator.handle(
            self.state, event, self._clock(), self._cfg
        )
        for command in commands:
            match command:
                case records.Train():
                    self._for_trainer[self.state.training.place] = command
                case records.Stop(training):
                    self._for_trainer.clear()
                    if training > self._heard_of:
                        self._heard_of = training
                        self._handle(records.TrainingStopped(training))
                case records.Generate(_, worker, _):
                    place = self.state.worker(worker).place
                    self._for_rollout[place].append(command)
                case records.ReturnRequests():
                    self._for_rollout[0].append(command)
                case _:
                    for place in self._places:
                        self._for_rollout[place].append(command)
        if commands:
            self._changed.notify_all()

    def _wait(
        self, take: Callable[[], _T | None], timeout_s: float | None
    ) -> _T | None:
        """Wait for what `take` finds; time-outs of the coordinator pass meanwhile."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self.closed:
                if (found := take()) is not None:
                    return found
                left_s = _LONGEST_WAIT_S
                if until_s is not None:
                    left_s = min(left_s, until_s - time.monotonic())
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
                self._handle(records.Tick())
        return None
