"""The rollouts of a run: each by weights of one age, `rollout.lag` RL steps.

With lag k the rollout that step s learns from is made with the weights that there were
after step s - 1 - k, never newer ones; the first k + 1 are made with those that the run
begins with. With 0 a rollout is made where it is asked for. With more a thread makes
one after the other while the learner updates, as far ahead as there are weights for it:
which ones are used is counted and not timed, so tokens and weights stay a function of
the settings.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from tlt_jax.models import params as model_params
from tlt_jax.rl import collector, rolled
from tlt_jax.rl.adaptation import adaptation
from tlt_jax.rl.update import updater
from tlt_jax.rl.workers import weight_sync
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import failures
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import schema

_MISMATCH = "mismatch/logprob_max_abs"


class Part(Protocol):
    """What a rollout changes beside the drafter."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs of it, fit for JSON."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """The policy after `step` RL steps.

    `placed` are the engines', of a `version`; `policy` is a copy of the learner's,
    which the next update would overwrite; None: without lag nobody asks for it.
    """

    step: int
    placed: Sequence[model_params.Params]
    version: int
    policy: model_params.Params | None = None


@dataclasses.dataclass
class _Entry:
    """A rollout that is made, or will be, for the step behind `step` others.

    `weights` are None once nobody needs them any more, `before` is what the parts were
    at its begin, `made` is None where it must not begin yet, as the run ends before,
    and `told` is what its own log-probabilities have shown, once they were computed.
    """

    step: int
    weights: Weights | None
    before: dict[str, Any] | None = None
    made: concurrent.futures.Future[rolled.Rolled] | None = None
    told: dict[str, Any] | None = None

    @property
    def is_there(self) -> bool:
        return self.made is not None and self.made.done() and not self.made.exception()


def check(lag: int, num_processes: int, devices_per_engine: int = 1) -> None:
    """Refuse a lag where a rollout cannot go on beside an update.

    Raises:
      schema.ConfigError: there are several processes, or engines with collectives of
        their own, which would wait for those of the update and these for them.
    """
    if lag and num_processes > 1:
        raise schema.ConfigError(
            f"rollout.lag={lag} in {num_processes} processes: a run of several has "
            "rollout.lag=0; or start one process, with all devices."
        )
    if lag and devices_per_engine > 1:
        raise schema.ConfigError(
            f"rollout.lag={lag} with engines of {devices_per_engine} devices each: set "
            "rollout.tensor=1, or rollout.lag=0."
        )


class Rollouts:
    """Makes a run's rollouts in their order, and hands each to its step.

    Attributes:
      lag: RL steps.
      newest: the weights after the last step.
    """

    newest: Weights

    def __init__(
        self,
        lag: int,
        num_steps: int,
        collecting: collector.Collector,
        adapting: adaptation.Adaptation | adaptation.NoAdaptation,
        workers: workers_lib.Workers,
        learning: updater.Updater,
        sync: weight_sync.WeightSync,
        parts: Mapping[str, Part],
        observer: watch_lib.Observer,
    ):
        """Take the parts of a run; none is begun beyond its `num_steps`.

        `parts` are those that a rollout changes, by the names that checkpoints have.

        Raises:
          schema.ConfigError: see `check`.
        """
        sizes = [engine.mesh.size for engine in workers.engines]
        check(lag, workers.group.num, max(sizes, default=1))
        self.lag, self._num_steps = lag, num_steps
        self._collector, self._adaptation = collecting, adapting
        self._workers, self._updater, self._sync = workers, learning, sync
        self._parts, self._observer = dict(parts), _Beside(observer)
        self._entries: collections.deque[_Entry] = collections.deque()
        self._has_ended = False
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        if lag:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "rollouts")

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        if self._thread is not None:
            if not all(entry.made.done() for entry in self._begun()):
                self._workers.abandon()
            self._thread.shutdown(cancel_futures=True)

    def renew(self, step: int) -> None:
        """Take up the learner's weights after `step` RL steps."""
        params = self._updater.train_state.params
        placed, version = self._sync.sync(params)
        copy = jax.tree.map(lambda x: x.copy(), params) if self.lag else None
        self.newest = Weights(step, placed, version, copy)
        if not self.lag:
            self._workers.set_params(placed, version)

    def keep(self, step: int) -> None:
        """Note that step `step` has left the weights as they were."""
        self.newest = dataclasses.replace(self.newest, step=step)

    def rest(self, watch: watch_lib.Watch) -> None:
        """Wait until no rollout is under way; give the engines the newest weights.

        Without lag that is so. `watch` gets the stage `wait`.
        """
        if self.lag:
            with watch.stage("wait"):
                self._wait()
            self._workers.set_params(self.newest.placed, self.newest.version)

    def take(self, step: int, watch: watch_lib.Watch) -> rolled.Rolled:
        """Return the rollout of the step behind `step` others; begin what may begin.

        Raises:
          failures.Abandoned: it was given up; it stays the next one.
        """
        first = self._entries[-1].step + 1 if self._entries else step
        for number in range(first, step + self.lag + 1):
            self._entries.append(_Entry(number, self.newest))
        entry = self._entries[0]
        if self._thread is None:
            # The entry stands there first: who gives it up asks what was before.
            found = self._roll(entry, watch)
        else:
            self._begin()
            with watch.stage("wait"), self._observer.awaited():
                entry.made.result()
            found = self._with_own_logprobs(entry, watch)
            watch.add(found.seconds)
        self._entries.popleft()
        return found

    def before(self) -> dict[str, Any]:
        """Return what parts were before a rollout that was given up; else nothing.

        No rollout is under way when this returns.
        """
        self._wait()
        left = [e for e in self._entries if e.before is not None and not e.is_there]
        return left[0].before if left else {}

    def state(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what waits to be learned from after `step` RL steps.

        Rollouts that are there, and of others the weights that they are to be made
        with: what JSON can hold, and arrays by name. Without lag there is nothing.
        """
        self._wait()
        told, arrays, policies = [], {}, []
        for entry in self._entries:
            if entry.step >= step + self.lag:
                continue
            one: dict[str, Any] = {"step": entry.step}
            if entry.is_there:
                found = self._with_own_logprobs(entry, watch_lib.Watch())
                one["rolled"], its = found.state()
                one["told"] = entry.told
                arrays |= {f"{entry.step}.{name}": x for name, x in its.items()}
            else:
                weights = entry.weights
                one["weights"] = [weights.step, weights.version]
                if one["weights"] not in policies:
                    policies.append(one["weights"])
                    leaves = jax.device_get(jax.tree.leaves(weights.policy))
                    names = (f"weights_{weights.step}.{i}" for i in range(len(leaves)))
                    arrays |= zip(names, leaves, strict=True)
            told.append(one)
        return {"entries": told} if self.lag else {}, arrays

    def restore(
        self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Go on from a `state`."""
        made: dict[int, Weights] = {}
        for one in state.get("entries", ()):
            number = one["step"]
            if "rolled" in one:
                head = f"{number}."
                its = {
                    name.removeprefix(head): array
                    for name, array in arrays.items()
                    if name.startswith(head)
                }
                found = rolled.restored(one["rolled"], its, self._collector.prompts_of)
                entry = _Entry(number, None, told=one["told"])
                entry.made = concurrent.futures.Future()
                entry.made.set_result(found)
            else:
                step, version = one["weights"]
                if step not in made:
                    made[step] = self._weights(step, version, arrays)
                entry = _Entry(number, made[step])
            self._entries.append(entry)

    def _weights(
        self, step: int, version: int, arrays: Mapping[str, np.ndarray]
    ) -> Weights:
        """Place older weights that a checkpoint has kept."""
        like = self._updater.learner.abstract_state().params
        leaves, treedef = jax.tree.flatten(like)
        placed = [
            jax.device_put(arrays[f"weights_{step}.{i}"], leaf.sharding)
            for i, leaf in enumerate(leaves)
        ]
        policy = jax.tree.unflatten(treedef, placed)
        return Weights(step, self._sync.place(policy), version, policy)

    def _begun(self) -> list[_Entry]:
        return [entry for entry in self._entries if entry.made is not None]

    def _begin(self) -> None:
        """Begin, in the thread and in their order, what is not begun."""
        for entry in self._entries:
            if entry.made is None and entry.step < self._num_steps:
                watch = watch_lib.Watch(self._workers.pools, self._observer, entry.step)
                entry.made = self._thread.submit(self._roll_next, entry, watch)

    def _wait(self) -> None:
        """Wait until no rollout is under way, and what it has taught is taken over."""
        concurrent.futures.wait([entry.made for entry in self._begun()])
        self._adaptation.settle()

    def _roll_next(self, entry: _Entry, watch: watch_lib.Watch) -> rolled.Rolled:
        """Make a rollout in the thread, unless one before it has come to nothing."""
        if self._has_ended:
            raise failures.Abandoned
        try:
            return self._roll(entry, watch)
        except BaseException:
            self._has_ended = True
            raise

    def _roll(self, entry: _Entry, watch: watch_lib.Watch) -> rolled.Rolled:
        entry.before = {name: part.state() for name, part in self._parts.items()}
        workers, adapting = self._workers, self._adaptation
        if self.lag:
            workers.set_params(entry.weights.placed, entry.weights.version)
        adapting.begin_rollout()
        collected = self._collector.collect(entry.step, watch)
        # One worker waits for nobody: it trains here, if it pays.
        adapting.end_rollout(collected.stats.accept_length, watch)
        row = adapting.row()
        if self.lag:
            row["rollout/lag"] = entry.step - entry.weights.step
        return rolled.of_collected(
            collected,
            row,
            workers.take_intervals(),
            workers.lost,
            watch.spent if self.lag else {},
        )

    def _with_own_logprobs(
        self, entry: _Entry, watch: watch_lib.Watch
    ) -> rolled.Rolled:
        """Return a rollout with log-probabilities that do not hang on its batches.

        They are the trainer's, by the weights that rolled out; once they are there
        nobody needs those any more. What was recorded is compared with them.
        """
        found = entry.made.result()
        if entry.told is None:
            entry.told = {}
            if found.useful is not None:
                given = entry.weights.policy, found.useful, watch
                useful, mismatch = self._updater.behaviour(*given)
                found = dataclasses.replace(found, useful=useful)
                entry.told = {_MISMATCH: mismatch}
            entry.weights = None
            entry.made = concurrent.futures.Future()
            entry.made.set_result(found)
        return dataclasses.replace(found, row=found.row | entry.told)


class _Beside(watch_lib.Observer):
    """Shows what is noted beside other work; to who waits for it, how far it is."""

    def __init__(self, observer: watch_lib.Observer):
        self._observer, self._shown = observer, False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Somebody waits."""
        self._shown = True
        try:
            yield
        finally:
            self._shown = False

    def stage(self, name: str) -> None:
        """Another's is shown."""

    def within(self, done: int, total: int, detail: str = "") -> None:
        if self._shown:
            self._observer.within(done, total, detail)

    def note(self, text: str) -> None:
        self._observer.note(text)
