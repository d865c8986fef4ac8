"""The queue of a rollout's requests, shared by its workers.

Every worker takes requests from the same queue when it has room, so none starves while
another has work that has not begun. Nobody takes more than an equal part of what is
waiting or being decoded: the worker that asks first would else have it all. Who takes
what changes no token, since noise is keyed by request and position (by a chain rule,
`SpeculatorConfig.rule`, it changes tokens and not their law).
"""

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from tlt_jax import types


class RequestSource(Protocol):
    """Where an engine takes its requests from: `Share` here, `remote.RemoteShare`.

    Attributes:
      num_waiting: requests that nobody has taken.
    """

    num_waiting: int

    def take(self) -> types.Request | None:
        """Take a request; None: none is waiting, or this engine has its part."""

    def finish(self, request_id: int) -> bool:
        """Note that a request is done; false: it had been taken away."""

    def waits(self, prompt_id: int) -> bool:
        """Tell whether a request of this prompt is waiting."""


class RequestQueue:
    """Requests that wait, and which worker holds which. Safe to use from threads.

    Attributes:
      num_waiting: requests that nobody has taken.
    """

    def __init__(
        self,
        requests: Sequence[types.Request],
        *,
        num_workers: int = 1,
        expected_lengths: Mapping[int, float] | None = None,
    ):
        """Queue requests of distinct ids, those expected to run longest first.

        `expected_lengths` are tokens by `prompt_id`, see `in_order`.
        """
        self._lock = threading.Lock()
        # By prompt, in the order of their first requests: a dict keeps it.
        self._waiting: dict[int, collections.deque[types.Request]] = {}
        for request in in_order(requests, expected_lengths or {}):
            group = self._waiting.setdefault(request.prompt_id, collections.deque())
            group.append(request)
        self.num_waiting = len(requests)
        self._held: list[dict[int, types.Request]] = [{} for _ in range(num_workers)]
        self._lost: set[int] = set()

    @property
    def num_left(self) -> int:
        """Requests that are waiting or being decoded."""
        with self._lock:
            return self.num_waiting + sum(map(len, self._held))

    def prompts_waiting(self) -> frozenset[int]:
        """Return the prompts of which requests are waiting."""
        with self._lock:
            return frozenset(self._waiting)

    def admit(self, worker: int) -> None:
        """Let a worker take requests that was not there before, or was lost."""
        with self._lock:
            new = range(len(self._held), worker + 1)
            self._held += [{} for _ in new]
            # Numbers between them are nobody's.
            self._lost = (self._lost | set(new)) - {worker}

    def share(self, worker: int) -> "Share":
        """Return what `worker` sees of the queue."""
        return Share(self, worker)

    def take(self, worker: int) -> types.Request | None:
        """Take the next request for a worker.

        First one of a prompt that the worker holds already, whose pages it shares; then
        the first of a prompt that no worker holds; then the first. None: none is
        waiting, or the worker has its part.
        """
        with self._lock:
            if not self._waiting or worker in self._lost:
                return None
            num_held = sum(map(len, self._held))
            num_workers = len(self._held) - len(self._lost)
            part = -(-(self.num_waiting + num_held) // num_workers)
            if len(self._held[worker]) >= part:
                return None
            prompt_id = self._choose(worker)
            group = self._waiting[prompt_id]
            request = group.popleft()
            if not group:
                del self._waiting[prompt_id]
            self.num_waiting -= 1
            self._held[worker][request.request_id] = request
            return request

    def finish(self, worker: int, request_id: int) -> bool:
        """Note that a worker is through with a request; tell whether it counts.

        A worker given up for lost finishes nothing any more.
        """
        with self._lock:
            return self._held[worker].pop(request_id, None) is not None

    def waits(self, prompt_id: int) -> bool:
        """Tell whether a request of this prompt is waiting."""
        return prompt_id in self._waiting

    def lose(self, worker: int) -> list[types.Request]:
        """Put back to the front, and return, what a worker holds: it is lost."""
        with self._lock:
            self._lost.add(worker)
            held = list(self._held[worker].values())
            self._held[worker] = {}
            for request in reversed(held):
                group = self._waiting.pop(request.prompt_id, collections.deque())
                group.appendleft(request)
                self._waiting = {request.prompt_id: group, **self._waiting}
            self.num_waiting += len(held)
            return held

    def _choose(self, worker: int) -> int:
        """The prompt whose request the worker takes next."""
        own = {request.prompt_id for request in self._held[worker].values()}
        taken = {r.prompt_id for held in self._held for r in held.values()}
        for wanted in (lambda p: p in own, lambda p: p not in taken):
            for prompt_id in self._waiting:
                if wanted(prompt_id):
                    return prompt_id
        return next(iter(self._waiting))


class Share(RequestSource):
    """What one worker sees of the queue."""

    def __init__(self, queue: RequestQueue, worker: int):
        """See `RequestQueue.share`."""
        self._queue, self._worker = queue, worker

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    def take(self) -> types.Request | None:
        return self._queue.take(self._worker)

    def finish(self, request_id: int) -> bool:
        return self._queue.finish(self._worker, request_id)

    def waits(self, prompt_id: int) -> bool:
        return self._queue.waits(prompt_id)

    def prompts_waiting(self) -> frozenset[int]:
        """See `RequestQueue.prompts_waiting`."""
        return self._queue.prompts_waiting()


def in_order(
    requests: Sequence[types.Request], expected_lengths: Mapping[int, float]
) -> list[types.Request]:
    """Order requests: longest expected first, otherwise as given; a stable sort.

    A long answer that starts late decides when the rollout ends. Lengths are in tokens,
    by `prompt_id`. Requests of a prompt without history count as of mean expected
    length, so that nothing is known to be shorter than they are stands before them.
    """
    known = [
        expected_lengths[r.prompt_id]
        for r in requests
        if r.prompt_id in expected_lengths
    ]
    typical = sum(known) / len(known) if known else 0.0
    return sorted(requests, key=lambda r: -expected_lengths.get(r.prompt_id, typical))
