"""One rollout by the workers of several processes: queue and coordinator of process 0.

Process 0 holds both and offers them to the others, whose workers take requests from the
same queue and whose drivers and trainers hear the same coordinator. Only numbers of
requests travel: every process has drawn the same requests.
"""

import threading
from collections.abc import Mapping, Sequence

from tlt_jax import types
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.workers import mailboxes, records
from tlt_jax.runtime import channel, distributed

_COORDINATION, _QUEUE = "coordination", "queue"
# A wait for the end of a training is renewed so often.
_WATCH_S = 1.0


class Home:
    """What process 0 has: the coordinator, and the queue of the present rollout."""

    def __init__(self, shared: mailboxes.Coordination, group: distributed.Group):
        """Offer both to the other processes."""
        self.coordination = shared
        self._lock = threading.Lock()
        self._queue: request_queue.RequestQueue | None = None
        self._generation = 0
        group.offer(_COORDINATION, shared)
        group.offer(_QUEUE, self)

    def state(self) -> records.State:
        """Return what the coordinator knows now."""
        return self.coordination.state

    def begin(
        self,
        queue: request_queue.RequestQueue,
        workers: Sequence[int],
        places: Sequence[int],
        trains: bool = True,
    ) -> int:
        """Begin a rollout with this queue; see `Coordination.begin`."""
        with self._lock:
            self._queue = queue
            self._generation = self.coordination.begin(workers, places, trains)
            return self._generation

    def share(self, generation: int, worker: int) -> request_queue.Share:
        """Return what a worker of this process sees of the queue."""
        del generation
        return self._queue.share(worker)

    def take(
        self, generation: int, worker: int
    ) -> tuple[int | None, frozenset[int], int]:
        """Take a request for a worker of another process.

        Returns its id or None, prompts of which requests wait, and how many wait.
        """
        queue = self._queue_of(generation)
        if queue is None:
            return None, frozenset(), 0
        request = queue.take(worker)
        taken = None if request is None else request.request_id
        return taken, queue.prompts_waiting(), queue.num_waiting

    def finish(self, generation: int, worker: int, request_id: int) -> bool:
        """See `RequestQueue.finish`; nothing of an earlier rollout counts."""
        queue = self._queue_of(generation)
        return queue is not None and queue.finish(worker, request_id)

    def _queue_of(self, generation: int) -> request_queue.RequestQueue | None:
        with self._lock:
            return self._queue if generation == self._generation else None


class Guest:
    """What another process has of the same: `coordination` answers like process 0's."""

    def __init__(self, group: distributed.Group):
        """Find them through the group's channel."""
        self.coordination = RemoteCoordination(group)
        self._group = group
        self._requests: Mapping[int, types.Request] = {}
        self._generation = 0

    def begin(self, requests: Sequence[types.Request]) -> int:
        """Take part in the next rollout; returns its generation."""
        self._requests = {request.request_id: request for request in requests}
        self._generation += 1
        return self._generation

    def share(self, generation: int, worker: int) -> "RemoteShare":
        """Return what a worker of this process sees of the queue."""
        return RemoteShare(self._group, generation, worker, self._requests)


class RemoteShare(request_queue.RequestSource):
    """What a worker of another process sees of the queue, as of its last look.

    A queue that was found empty is not asked again: of requests that a lost worker
    gives back the coordinator tells those who are done.
    """

    def __init__(
        self,
        group: distributed.Group,
        generation: int,
        worker: int,
        requests: Mapping[int, types.Request],
    ):
        """See `Guest.share`."""
        self._group, self._requests = group, requests
        self._worker = generation, worker
        self._prompts: frozenset[int] = frozenset()
        self.num_waiting = len(requests)

    def take(self) -> types.Request | None:
        if not self.num_waiting:
            return None
        taken, self._prompts, self.num_waiting = self._group.call(
            _QUEUE, "take", *self._worker
        )
        return None if taken is None else self._requests[taken]

    def finish(self, request_id: int) -> bool:
        return self._group.call(_QUEUE, "finish", *self._worker, request_id)

    def waits(self, prompt_id: int) -> bool:
        return prompt_id in self._prompts


class RemoteCoordination:
    """The coordinator of process 0, for a driver and a trainer of another process.

    See `mailboxes.Coordination`. Where process 0 is gone it is closed.

    A trainer asks a thousand times a second whether it shall stop, while process 0
    decodes: a thread waits there for the answer instead, of one training at a time.

    Attributes:
      closed: threads shall end.
    """

    def __init__(self, group: distributed.Group):
        """Find it through the group's channel."""
        self._group = group
        self.closed = False
        self._watched: tuple[int, threading.Event] = 0, threading.Event()

    @property
    def state(self) -> records.State:
        """What process 0 knows now."""
        return self._call("state", name=_QUEUE) or records.State()

    def send(self, event: object) -> None:
        """Give an event."""
        self._call("send", event)

    def next_command(self, timeout_s: float | None = None) -> records.Command | None:
        """Wait for the next command to this process's driver."""
        return self._call("next_command", timeout_s, self._group.index)

    def next_training(self, timeout_s: float | None = None) -> records.Train | None:
        """Wait for a training on this process's workers, or for more to join it."""
        return self._call("next_training", timeout_s, self._group.index)

    def should_stop(self, training: int) -> bool:
        """Say whether the trainer must not begin another step."""
        watched, stop = self._watched
        if training != watched:
            stop = threading.Event()
            self._watched = training, stop
            if self._call("should_stop", training) is not False:
                stop.set()
            else:
                threading.Thread(
                    target=self._watch, args=(training, stop), daemon=True
                ).start()
        return self.closed or stop.is_set()

    def _watch(self, training: int, stop: threading.Event) -> None:
        """Wait until a training shall stop, or nobody asks for it any more."""
        while not stop.is_set() and self._watched[1] is stop and not self.closed:
            if self._call("wait_to_stop", training, _WATCH_S) is not False:
                stop.set()

    def may_publish(self, training: int) -> bool:
        """Say whether the training's drafter counts."""
        return bool(self._call("may_publish", training))

    def close(self) -> None:
        """Let this process's threads go when they next look."""
        self.closed = True

    def _call(self, method: str, *args, name: str = _COORDINATION):
        """Call it; None where process 0 is gone, which the next meeting tells."""
        try:
            return self._group.call(name, method, *args)
        except channel.ProcessError:
            self.closed = True
            return None
