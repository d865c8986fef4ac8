"""What survives a kill: every part that changes, saved and restored together."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from tlt_jax.models import config as model_config
from tlt_jax.rl.update import updater
from tlt_jax.runtime import train_state
from tlt_jax.settings import sections
from tlt_jax.workdir import checkpoint

# What a checkpoint calls the rollouts that wait, and their arrays.
_ROLLOUTS = "rollouts"


class Stateful(Protocol):
    """A part that changes in a run."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs of it, fit for JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""


class Store(Protocol):
    """Keeps a part whose arrays have a folder of their own."""

    def save(self, step: int) -> None:
        """Write the part as it is after a step; may go on in the background."""

    def restore(self, step: int) -> None:
        """Go on from what was written of the step, or the newest before.

        Step 0 is a run's begin: what a killed start left there is removed.
        """

    def wait(self) -> None:
        """Wait until all is on disk."""


class Rollouts(Protocol):
    """Rollouts that wait to be learned from, see `rl.rollouts.Rollouts`."""

    def before(self) -> dict[str, Any]:
        """Return what parts were, by name, before a rollout that was given up."""

    def state(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what waits after a step: fit for JSON, and arrays; or nothing."""

    def restore(
        self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Go on from a `state`."""


class RunState(contextlib.AbstractContextManager):
    """The state of a run in its directory. Use as a context manager.

    Attributes:
      step: RL steps done.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        cfg: sections.Checkpoint,
        model: model_config.ModelConfig,
        learning: updater.Updater,
        parts: Mapping[str, Stateful],
        stores: tuple[Store, ...],
        rollouts: Rollouts,
        about: Mapping[str, Any],
        note: Callable[[str], None],
    ):
        """Open the directory; nothing is read yet.

        `parts` are whatever changes beside weights and optimizer, by the name that the
        checkpoint has for it; `stores` keep arrays of their own, and `rollouts` say
        what waits. `about` is what `identity.claim` says of the run. `note` is told a
        line where a damaged checkpoint is passed over.
        """
        self.step = 0
        self._model, self._learning = model, learning
        self._parts = dict(parts) | {"updater": learning}
        self._stores, self._rollouts, self._about = stores, rollouts, dict(about)
        self._checkpointer = checkpoint.Checkpointer(
            directory,
            cfg.keep,
            pass_over=note if cfg.on_damage == "previous" else None,
        )

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def restore(self) -> bool:
        """Take up the newest checkpoint, and say whether there is one.

        Raises:
          checkpoint.CheckpointError: it is damaged, or of an earlier version of this
            package.
        """
        target = self._learning.learner.abstract_state()
        found = self._checkpointer.restore_latest(
            target.params, (target.opt_state, target.num_updates), _ROLLOUTS
        )
        if found is None:
            # Theirs may be complete where it was killed before the policy's was.
            for store in self._stores:
                store.restore(0)
            return False
        saved = found.meta.get("parts", {})
        if saved.keys() != self._parts.keys():
            raise checkpoint.CheckpointError(
                f"the checkpoint of step {found.step} was written by another version "
                "of tlt_jax: go on with that version, or begin in another --workdir."
            )
        state = train_state.TrainState(found.params, *found.opt_state)
        self._learning.train_state = state
        self.step = found.step
        for name, part in self._parts.items():
            part.restore(saved[name])
        for store in self._stores:
            store.restore(self.step)
        self._rollouts.restore(found.meta.get(_ROLLOUTS, {}), found.arrays)
        return True

    def parts(self) -> dict[str, Any]:
        """Return the state of what changes beside weights and optimizer, by name.

        A rollout that was given up has changed none of it.
        """
        before = self._rollouts.before()
        return {name: part.state() for name, part in self._parts.items()} | before

    def save(self) -> None:
        """Write a checkpoint of this step, in the background.

        Rollouts that go on beside it are waited for.
        """
        meta = self._about | {"parts": self.parts()}
        waiting, arrays = self._rollouts.state(self.step)
        more = {}
        if waiting:
            kinds = {name: [list(x.shape), x.dtype.name] for name, x in arrays.items()}
            meta |= {_ROLLOUTS: waiting, "arrays": kinds}
            # Orbax takes no empty ones.
            more[_ROLLOUTS] = {name: x for name, x in arrays.items() if x.size}
        # Before the policy's: every one of those finds theirs of its step.
        for store in self._stores:
            store.save(self.step)
        state = self._learning.train_state
        counted = (state.opt_state, state.num_updates)
        given = state.params, counted, self._model, meta, more
        self._checkpointer.save(self.step, *given)

    def complete(self) -> None:
        """Save this step unless it is saved, or none was taken; wait for the disk."""
        if self.step and self.latest_step() != self.step:
            self.save()
        self.wait()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, waiting for one to be."""
        self._checkpointer.wait()
        return self._checkpointer.latest_step()

    def wait(self) -> None:
        """Wait until everything is on disk."""
        self._checkpointer.wait()
        for store in self._stores:
            store.wait()
