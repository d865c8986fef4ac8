"""Where a run keeps its drafter: written by the first process, read for all."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import jax

from tlt_jax.rl.adaptation import adaptation
from tlt_jax.runtime import distributed
from tlt_jax.runtime import observer as observer_lib
from tlt_jax.settings import sections
from tlt_jax.workdir import drafter_checkpoint


@contextlib.contextmanager
def opened(
    adapted: adaptation.Adaptation | adaptation.NoAdaptation,
    directory: pathlib.Path,
    cfg: sections.Checkpoint,
    group: distributed.Group,
    observer: observer_lib.Observer,
) -> Iterator[tuple["DrafterStore", ...]]:
    """Open the store of a run's drafter; nothing where it has no learned one."""
    if isinstance(adapted, adaptation.NoAdaptation):
        yield ()
        return
    keep = cfg.keep + 1
    with DrafterStore(adapted, directory, cfg.drafter, keep, group, observer) as store:
        yield (store,)


class DrafterStore:
    """Saves and restores an adaptation. Use as a context manager."""

    def __init__(
        self,
        adapted: adaptation.Adaptation,
        directory: pathlib.Path,
        mode: drafter_checkpoint.Mode,
        keep: int,
        group: distributed.Group,
        observer: observer_lib.Observer,
    ):
        """Open the directory, in the first process.

        Args:
          adapted: what is saved.
          directory, mode, keep: see `drafter_checkpoint.DrafterCheckpointer`.
          group: the processes; all of them call `restore` and `save`.
          observer: told what the user should know.
        """
        self._adapted, self._group, self._observer = adapted, group, observer
        self._checkpointer: drafter_checkpoint.DrafterCheckpointer | None = None
        if group.is_first:
            self._checkpointer = drafter_checkpoint.DrafterCheckpointer(
                directory, mode, keep
            )

    def __enter__(self) -> "DrafterStore":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as closing:
            if self._checkpointer is not None:
                closing.enter_context(self._checkpointer)

    def wait(self) -> None:
        """Wait until every checkpoint is complete on disk."""
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def save(self, step: int) -> None:
        """Write what the first process has; the texts of the others are not kept."""
        if self._checkpointer is None:
            return
        arrays, meta = self._adapted.state()
        self._checkpointer.save(
            step,
            self._adapted.learner.state,
            self._adapted.cfg,
            target=self._adapted.target(),
            arrays=arrays,
            meta=meta,
        )

    def restore(self, step: int) -> None:
        """Go on from the drafter's checkpoint of the run's step, or the newest before.

        The others get the drafter from the first process, which keeps the texts.
        """
        found = None
        if self._checkpointer is not None:
            found = self._checkpointer.restore(
                self._adapted.learner.abstract_state(), at_most=step
            )
            if found is None or found.step < step:
                self._observer.note(
                    f"there is no checkpoint of the drafter of step {step}: "
                    + ("it begins anew." if found is None else "an older one goes on.")
                )
        if self._group.num > 1:
            given = self._group.first("drafter restored", lambda: _for_others(found))
            found = found if self._group.is_first else given
        if found is not None:
            self._adapted.restore(found.state, found.arrays, found.meta)


def _for_others(
    found: drafter_checkpoint.Restored | None,
) -> drafter_checkpoint.Restored | None:
    if found is None:
        return None
    return dataclasses.replace(
        found,
        state=jax.device_get(found.state),
        arrays=adaptation.without_texts(found.arrays),
    )
