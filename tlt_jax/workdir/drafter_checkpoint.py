"""Checkpoints of a drafter that is trained during a run: written by one process.

What changes in drafter training is one layer and its optimizer; embedding and head are
the target's and lie in the run's own checkpoint. `selective` writes the former alone,
in the background: what a run uses. `async` and `blocking` write everything that the
drafter computes with, in the background and with the caller waiting; they are what
`experiments.checkpoint_stall` compares it with. All three are read alike.
"""

import contextlib
import pathlib
import time
import typing
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.runtime import distributed, train_state
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import sections
from tlt_jax.specdec.training import unroll
from tlt_jax.workdir import checkpoint

DIRECTORY = "drafter_checkpoints"
Mode = Literal["blocking", "async", "selective"]
MODES: tuple[Mode, ...] = typing.get_args(Mode)
_FROZEN, _ARRAYS = "frozen", "arrays"
# What checkpoints of earlier versions do not say of a drafter.
_DEFAULTS = dict.fromkeys(("join_bias", "norm_before_residual", "own_head"), False)
_DEFAULTS |= {"architecture": "tlt", "block_size": 0, "markov_rank": 0}


class DrafterCheckpointer(contextlib.AbstractContextManager):
    """Writes a drafter's checkpoints and reads the one of a step."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        mode: Mode = "selective",
        keep: int = 3,
        pass_over: Callable[[str], None] | None = None,
    ):
        """Open `<workdir>/drafter_checkpoints`, creating it if needed.

        The newest `keep` are kept: one more than the run keeps of its own, so that each
        of those finds the drafter's of its step. For `pass_over` see
        `checkpoint.Checkpointer`.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: use {', '.join(MODES)}.")
        self._mode = mode
        self._checkpointer = checkpoint.Checkpointer(
            workdir, keep, DIRECTORY, True, pass_over
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        snapshot: train_state.Snapshot,
        cfg: drafter.DrafterConfig,
        target: unroll.Target | None = None,
    ) -> float:
        """Write a checkpoint, or begin to; the state may be donated afterwards.

        `step` counts RL steps done. The snapshot has the drafter and its optimizer, and
        what else shall be there: the state of a `text_buffer.TextBuffer` and of a
        `text_sampling.Sampler`, say. `target` is written in the modes `blocking` and
        `async` only, and needed there. Returns the seconds that the caller waited.

        Raises:
          checkpoint.CheckpointError: this one or the one before could not be written.
        """
        started = time.perf_counter()
        arrays = {name: np.asarray(array) for name, array in snapshot.arrays.items()}
        more = {}
        # Orbax takes no empty ones.
        filled = {name: array for name, array in arrays.items() if array.size}
        if filled:
            more[_ARRAYS] = filled
        if self._mode != "selective":
            if target is None:
                raise ValueError(f"mode={self._mode!r} writes the target: give it.")
            # A tree without a missing leaf.
            more[_FROZEN] = {k: v for k, v in vars(target).items() if v is not None}
        kinds = {name: [list(x.shape), x.dtype.name] for name, x in arrays.items()}
        record = {"arrays": kinds, "meta": snapshot.meta}
        state = snapshot.state
        counted = (state.opt_state, state.num_updates)
        self._checkpointer.save(step, state.params, counted, cfg, record, more)
        if self._mode == "blocking":
            self._checkpointer.wait()
        return time.perf_counter() - started

    def restore(
        self, like: train_state.TrainState, at_most: int | None = None
    ) -> tuple[int, train_state.Snapshot] | None:
        """Read the newest checkpoint, bit for bit, its arrays in host memory.

        `like` is a state of the wanted shapes and shardings, `at_most` the run's own
        step. Later checkpoints, left by a run that was killed before its own was
        complete, are removed: they will be written again.

        Returns:
          RL steps done when it was taken, and what was saved; or None if there is none.

        Raises:
          checkpoint.CheckpointError: it is damaged, or of another drafter.
        """
        if at_most is not None:
            self._checkpointer.delete_after(at_most)
        found = self._checkpointer.restore_latest(
            like.params, (like.opt_state, like.num_updates), _ARRAYS
        )
        if found is None:
            return None
        state = train_state.TrainState(found.params, *found.opt_state)
        return found.step, train_state.Snapshot(state, found.arrays, found.meta["meta"])

    def wait(self) -> None:
        """Wait until every checkpoint is complete on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Wait, then release the directory."""
        self._checkpointer.close()


class Trained(Protocol):
    """A drafter that a run trains, as its checkpoints need it.

    Where it does not train there is none, and nothing of the rest.
    """

    trains: bool
    cfg: drafter.DrafterConfig

    def abstract_state(self) -> train_state.TrainState:
        """Describe what is trained."""

    def state(self) -> train_state.Snapshot:
        """Return what survives a kill."""

    def restore(self, snapshot: train_state.Snapshot) -> None:
        """Go on from it."""

    def target(self) -> unroll.Target:
        """Return what it computes with and does not change; all processes call it."""

    def for_others(self, snapshot: train_state.Snapshot) -> train_state.Snapshot:
        """Leave out what the first process alone keeps."""


@contextlib.contextmanager
def opened(
    trained: Trained,
    directory: pathlib.Path,
    cfg: sections.Checkpoint,
    group: distributed.Group,
    observer: watch_lib.Observer,
) -> Iterator[tuple["DrafterStore", ...]]:
    """Open the store of a run's drafter; nothing where it has no learned one."""
    if not trained.trains:
        yield ()
        return
    with DrafterStore(trained, directory, cfg, group, observer) as store:
        yield (store,)


class DrafterStore(contextlib.AbstractContextManager):
    """Keeps a run's drafter: written by the first process, read for all."""

    def __init__(
        self,
        trained: Trained,
        directory: pathlib.Path,
        cfg: sections.Checkpoint,
        group: distributed.Group,
        observer: watch_lib.Observer,
    ):
        """Open the directory, in the first process.

        All processes of the group call `restore` and `save`; see `DrafterCheckpointer`.
        """
        self._trained, self._group, self._observer = trained, group, observer
        self._mode = cfg.drafter
        self._checkpointer: DrafterCheckpointer | None = None
        if group.is_first:
            pass_over = observer.note if cfg.on_damage == "previous" else None
            self._checkpointer = DrafterCheckpointer(
                directory, cfg.drafter, cfg.keep + 1, pass_over
            )

    def __exit__(self, *details: object) -> None:
        if self._checkpointer is not None:
            self._checkpointer.__exit__(*details)

    def wait(self) -> None:
        """Wait until every checkpoint is complete on disk."""
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def save(self, step: int) -> None:
        """Write what the first process has; the texts of the others are not kept."""
        one = self._trained
        # Which all processes make together.
        target = None if self._mode == "selective" else one.target()
        if self._checkpointer is not None:
            self._checkpointer.save(step, one.state(), one.cfg, target)

    def restore(self, step: int) -> None:
        """Go on from the drafter's checkpoint of the run's step, or the newest before.

        There is none of step 0: later ones are removed, and the drafter begins anew.
        The others get the drafter from the first process, which keeps the texts.
        """
        trained, found = self._trained, None
        if self._checkpointer is not None:
            there = self._checkpointer.restore(trained.abstract_state(), at_most=step)
            if step and (there is None or there[0] < step):
                self._observer.note(
                    f"there is no checkpoint of the drafter of step {step}: "
                    + ("it begins anew." if there is None else "an older one goes on.")
                )
            found = there and there[1]
        if self._group.num > 1:
            given = self._group.first_large(
                "drafter restored", lambda: found and trained.for_others(found)
            )
            found = found if self._group.is_first else given
        if found is not None:
            trained.restore(found)


def restore_weights(
    workdir: str | pathlib.Path, step: int | None = None
) -> tuple[drafter.DrafterConfig, drafter.DrafterParams, int, int]:
    """Read a run's drafter and nothing else of its training; the run may go on.

    `step` counts RL steps done; None: the newest checkpoint.

    Returns:
      The drafter, its weights with `draft_ids`, `sharpness` and `tau`, the step,
      and its version: how often it was given to the engines, 0: never.

    Raises:
      checkpoint.CheckpointError: there is no such checkpoint, or it is damaged.
    """

    def describe(fields, dtype):
        cfg = drafter_io.from_json(_DEFAULTS | fields)
        return jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype)),
            drafter.describe(cfg),
        )

    params, record, arrays = checkpoint.restore_trained(
        workdir, DIRECTORY, step, describe, _ARRAYS
    )
    cfg = drafter_io.from_json(_DEFAULTS | record["model"])
    meta = record["driver"]["meta"]
    # Older checkpoints have no tau.
    sharpness = np.float32(meta.get("sharpness", drafter.SHARPNESS))
    tau = np.float32(meta.get("tau", drafter.TAU))
    params = params.replace(
        draft_ids=arrays.get("draft_ids"), sharpness=sharpness, tau=tau
    )
    return cfg, params, record["step"], meta.get("version", 0)
