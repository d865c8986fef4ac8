"""Records of the coordinator: its thresholds, events, commands and state."""

import dataclasses
import enum
import math


class Activity(enum.StrEnum):
    """What a worker does.

    LOST: it died or hangs, and takes no part any more. COMPILING: it waits for a
    program; the coordinator takes it for busy, the timeline tells it apart.
    """

    BUSY = "busy"
    COMPILING = "compiling"
    IDLE = "idle"
    TRAINING = "training"
    LOST = "lost"


@dataclasses.dataclass(frozen=True)
class Config:
    """Thresholds and time-outs.

    Attributes:
      min_idle: waiting workers of a process that begin a training; those of it who
        finish later join.
      max_members: workers that train together at most, of those who wait; None: all.
      heartbeat_timeout_s: a generating worker that says nothing for longer is lost.
      stop_timeout_s: a trainer that was asked to stop and does not answer for longer
        is given up: its drafter is void, and it gets no work until it answers.
      resend_s: commands without an answer are repeated this often; for transports that
        lose messages.
      max_restarts: trainings begun again in one rollout after one that failed.
    """

    min_idle: int = 1
    max_members: int | None = None
    heartbeat_timeout_s: float = 900.0
    stop_timeout_s: float = 60.0
    resend_s: float = math.inf
    max_restarts: int = 0

    def __post_init__(self):
        if self.min_idle < 1:
            raise ValueError(f"min_idle={self.min_idle} is out of range: at least 1.")
        for name in ("heartbeat_timeout_s", "stop_timeout_s", "resend_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0.")


# Events and commands, of classes that say what they carry.


@dataclasses.dataclass(frozen=True)
class _OfRollout:
    generation: int


@dataclasses.dataclass(frozen=True)
class _OfWorker(_OfRollout):
    worker: int


@dataclasses.dataclass(frozen=True)
class _OfRound(_OfWorker):
    round: int


@dataclasses.dataclass(frozen=True)
class _OfTraining:
    training: int


# Events.


@dataclasses.dataclass(frozen=True)
class RolloutAsked(_OfRollout):
    """The driver wants rollout number `generation` (rising) on these workers.

    `places` names for each the process that it belongs to; empty: all to process 0.
    Those who wait train the drafter where it `trains`.
    """

    workers: tuple[int, ...]
    places: tuple[int, ...] = ()
    trains: bool = True


@dataclasses.dataclass(frozen=True)
class WorkerCame(_OfRound):
    """A worker can generate that was lost or not there when the rollout began.

    Its `round` is one above the one in which it was lost, else 0.
    """

    place: int = 0


class WorkerAlive(_OfRound):
    """A worker generates in this round."""


class WorkerDone(_OfRound):
    """A worker has finished its requests and found the queue empty."""


@dataclasses.dataclass(frozen=True)
class WorkerFailed(_OfWorker):
    """A worker has died, in a round of those up to `round`; None: in whichever it is.

    One that came anew after that has not.
    """

    reason: str
    round: int | None = None


@dataclasses.dataclass(frozen=True)
class RequestsReturned(_OfWorker):
    """A lost worker's unfinished requests, if any, are in the queue again.

    They are those up to the `round` that was named.
    """

    round: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingRuns(_OfTraining):
    """The trainer works on the members of `Train` number `training`, `revision`."""

    revision: int


class TrainingStopped(_OfTraining):
    """The trainer has ended this training, or never heard of it and never will."""


@dataclasses.dataclass(frozen=True)
class TrainingFailed(_OfTraining):
    """The trainer has ended this training after an error; the drafter is unchanged."""

    reason: str


@dataclasses.dataclass(frozen=True)
class RunAbandoned:
    """The run shall end: no rollout goes on, and none that is asked for begins."""


@dataclasses.dataclass(frozen=True)
class Tick:
    """Time has passed."""


# Commands.


class Generate(_OfRound):
    """A worker shall take requests until the queue is empty.

    A worker ignores a pair (generation, round) that is not above its last one.
    """


@dataclasses.dataclass(frozen=True)
class ReturnRequests(_OfWorker):
    """A lost worker's unfinished requests shall go back into the queue.

    They are those of its rounds up to `round`. From then on it gets no requests in this
    rollout, unless a `Generate` of a later round says that it has come anew.
    `RequestsReturned` answers.
    """

    round: int = 0


class EndRollout(_OfRollout):
    """All requests have been generated and nobody trains."""


@dataclasses.dataclass(frozen=True)
class Abort(_OfRollout):
    """The run must stop: no worker is left, as the message says; without: it shall."""

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Train(_OfTraining):
    """The trainer shall work on these workers; a higher revision has more of them.

    They are all of one process. `TrainingRuns` answers, or `TrainingFailed`. A trainer
    ignores what is not above the last number and revision it heard, and numbers it was
    told to stop.
    """

    revision: int
    workers: tuple[int, ...]


class Stop(_OfTraining):
    """The trainer shall begin no further step; `TrainingStopped` answers."""


Command = Generate | ReturnRequests | EndRollout | Abort | Train | Stop


# State.


@dataclasses.dataclass(frozen=True)
class Worker:
    """One worker.

    Attributes:
      number: its name.
      place: the process that it belongs to.
      activity: what it does.
      since_s: the time at which it began that.
      round: how many times it was asked to generate in this rollout, less one.
      heard_s: time of its last word, or of the request to generate.
      answered: it has spoken in this round.
      reason: why it is lost.
    """

    number: int
    place: int
    activity: Activity
    since_s: float
    round: int = 0
    heard_s: float = 0.0
    answered: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Training:
    """The training that runs, or shall.

    Attributes:
      number: of the training; rises over the run.
      place: the process whose trainer works; all members belong to it.
      revision: of the list of members.
      joined: revision by worker, as pairs: the one with which it was asked to join.
      running: last revision that the trainer says it works with; -1: none.
      stop_asked_s: time of the request to stop; None: it goes on.
    """

    number: int
    place: int
    revision: int
    joined: tuple[tuple[int, int], ...]
    running: int = -1
    stop_asked_s: float | None = None

    @property
    def members(self) -> tuple[int, ...]:
        """Workers that were asked to join."""
        return tuple(worker for worker, _ in self.joined)


@dataclasses.dataclass(frozen=True)
class Interval:
    """What a worker did from `start_s` to `stop_s`."""

    worker: int
    activity: Activity
    start_s: float
    stop_s: float


@dataclasses.dataclass(frozen=True)
class State:
    """Everything the coordinator knows.

    Attributes:
      now_s: time of the last event.
      generation: of the rollout that runs or ran last; 0: none yet.
      rolling: a rollout runs.
      began_s, ended_s: its first and last moment.
      workers: those of the rollout.
      intervals: what they did in it, up to the last change of each.
      asked: a rollout that waits for the training's end.
      training: the one that runs or is being stopped.
      num_trainings: begun so far, over the run.
      num_restarts: trainings that failed in this rollout.
      given_up: number of a training whose end was never acknowledged; 0: none.
      trains: those who wait may train the drafter in it.
      unreturned: lost workers whose requests are not known to be in the queue.
      unclaimed: requests were returned, and nobody is known to look for them.
      failure: why no worker is left, where the rollout was aborted for it.
      abandoned: the run shall end.
      trainer_failure: why the last training failed.
      sent_s: time at which unanswered commands were last repeated.
    """

    now_s: float = 0.0
    generation: int = 0
    rolling: bool = False
    began_s: float = 0.0
    ended_s: float = 0.0
    workers: tuple[Worker, ...] = ()
    intervals: tuple[Interval, ...] = ()
    asked: RolloutAsked | None = None
    training: Training | None = None
    num_trainings: int = 0
    num_restarts: int = 0
    given_up: int = 0
    trains: bool = True
    unreturned: frozenset[int] = frozenset()
    unclaimed: bool = False
    failure: str = ""
    abandoned: bool = False
    trainer_failure: str = ""
    sent_s: float = 0.0

    def which(self, activity: Activity) -> tuple[int, ...]:
        """Return the workers that do this."""
        return tuple(w.number for w in self.workers if w.activity == activity)

    def worker(self, number: int) -> Worker | None:
        """Return a worker of this rollout, or None."""
        return next((w for w in self.workers if w.number == number), None)
