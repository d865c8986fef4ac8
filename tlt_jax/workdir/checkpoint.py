"""Checkpoints of a run: policy, optimizer state and what the driver must remember.

One directory per step below `<workdir>/checkpoints`. A checkpoint appears under its
final name only when it is complete, so a killed process leaves none that is half
written. The policy, the optimizer state and the JSON record are separate items: an
export reads the policy alone. Beside them stand checksums of all files, which are
compared before anything is read.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tlt_jax.models import config as model_config
from tlt_jax.models import params as params_lib
from tlt_jax.runtime import failures, train_state
from tlt_jax.workdir import checksums

DIRECTORY = "checkpoints"
_POLICY, _OPTIMIZER, _META = "policy", "optimizer", "meta"
_Tree = TypeVar("_Tree")
_VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(failures.UserError):
    """A checkpoint that cannot be written or read."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint's content.

    `step` is the number of RL steps done when it was taken; the rest is what `save` was
    given, `arrays` one of the trees of `more`.
    """

    step: int
    params: params_lib.Params
    opt_state: Any
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Checkpointer(contextlib.AbstractContextManager):
    """Writes a run's checkpoints in the background and reads the newest one.

    Use as a context manager, or call `close`: a checkpoint still being written is
    finished then.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        keep: int = 2,
        name: str = DIRECTORY,
        alone: bool = False,
        pass_over: Callable[[str], None] | None = None,
    ):
        """Open `<workdir>/<name>`, creating it if needed.

        What a killed process left half written there is removed. The newest `keep` are
        kept on disk, at least 1. If this one is `alone`, it alone of several processes
        writes and reads here what it holds alone; otherwise all of them take part.
        A damaged checkpoint is refused, or, if there is somebody to tell a line, passed
        over for the one before and removed.

        Raises:
          CheckpointError: something else is in its place.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint: at least 1.")
        self._directory = _directory(workdir, name)
        self._begun: int | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self._directory} cannot be a directory ({error.strerror}): move "
                "what is in its place, or use another --workdir."
            ) from error
        self._pass_over = pass_over
        own, num = jax.process_index(), jax.process_count()
        # Of several processes one looks, and tells the others what it has seen.
        self._is_first, self._shares = alone or own == 0, num > 1 and not alone
        processes = ocp.options.MultiprocessingOptions()
        if alone:
            processes = ocp.options.MultiprocessingOptions(
                primary_host=own,
                active_processes={own},
                barrier_sync_key_prefix=f"{name}_{own}",
            )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                # Made above; of one of several processes Orbax would not do it.
                create=False,
                multiprocessing_options=processes,
                max_to_keep=keep,
                enable_async_checkpointing=True,
                # Directories made in the background would leave the writers waiting
                # for minutes where they cannot be made.
                async_options=ocp.options.AsyncOptions(
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._add_checksums,
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        cfg: Any,
        meta: dict[str, Any],
        more: dict[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint and return once the arrays are copied.

        The arrays may be donated afterwards. Only one checkpoint is written at a time:
        a call waits for the one before.

        Args:
          step: RL steps done.
          params: what is trained: the policy, layers stacked, or a drafter.
          opt_state: the optimizer state.
          cfg: its architecture, a dataclass, so that a policy can be restored without
            the run.
          meta: anything that JSON can hold: config digest, task position, ...
          more: further trees of arrays by name. Orbax takes no array of size zero.

        Raises:
          CheckpointError: this checkpoint or the one before could not be written.
        """
        if isinstance(getattr(params, "layers", None), tuple):
            raise ValueError(
                "params.layers is a tuple of layers: checkpoints hold them stacked."
            )
        trees = {_POLICY: params, _OPTIMIZER: opt_state} | (more or {})
        record = {
            "step": step,
            "model": dataclasses.asdict(cfg),
            "param_dtype": str(jax.tree.leaves(params)[0].dtype),
            "shapes": _shapes(params, opt_state),
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
            "driver": meta,
        }
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items[_META] = ocp.args.JsonSave(record)
        # What is wrong with the one before shall not be said of this one.
        self._finish_begun()
        self._begun = step
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until every checkpoint is complete on disk.

        Raises:
          CheckpointError: one could not be written.
        """
        self._finish_begun()

    def _finish_begun(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, then release the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore_latest(
        self, params: Any, opt_state: Any, item: str = ""
    ) -> Restored | None:
        """Read the newest complete checkpoint, bit for bit, or None if there is none.

        `params` and `opt_state` are trees of arrays, or of `jax.ShapeDtypeStruct`s with
        a sharding, of the wanted shapes, dtypes and shardings. The mesh need not be the
        one that the checkpoint was written from. For `item` see `restore_trained`.

        Raises:
          DamagedError: it is damaged.
          CheckpointError: it is of another model or optimizer.
        """
        step = self._newest_whole()
        if step is None:
            return None
        self.delete_after(step)
        read = _Reader(self._manager, self._directory, step)
        # Compared here because Orbax notices in the midst of reading.
        _check_shapes(step, read.record["shapes"], _shapes(params, opt_state))
        content = read.trees({_POLICY: params, _OPTIMIZER: opt_state})
        return Restored(
            step,
            content[_POLICY],
            content[_OPTIMIZER],
            read.record["driver"],
            read.arrays(item),
        )

    def _newest_whole(self) -> int | None:
        """Return the step to go on from; tell the damaged ones that are passed over."""
        # Orbax counts one that it still writes.
        self._finish_begun()
        steps, error = sorted(self._manager.all_steps()), None
        while steps and self._is_first:
            try:
                _check_whole(self._directory, steps[-1])
                break
            except DamagedError as damage:
                if self._pass_over is None or len(steps) == 1:
                    error = damage
                    break
                told = str(damage).partition(" Delete ")[0]
                self._pass_over(
                    f"{told} That of step {steps[-2]} is taken instead, and this one "
                    "removed."
                )
                steps.pop()
        step = steps[-1] if steps else -1
        if self._shares:
            mine = np.array([step, error is not None])
            step, is_damaged = multihost_utils.broadcast_one_to_all(mine).tolist()
            if is_damaged and error is None:
                error = DamagedError(f"the checkpoint of step {step} is damaged.")
        if error is not None:
            raise error
        return None if step < 0 else step

    def _add_checksums(self) -> None:
        """Add the checksums, before the checkpoint gets its name; a thread of Orbax's.

        Of several processes one does.
        """
        if self._is_first:
            (folder,) = self._directory.glob(f"{self._begun}.orbax-checkpoint-tmp*")
            checksums.write(folder)

    def delete_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: a run goes on from `step`."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"writing the checkpoint of step {self._begun} below {self._directory} "
                f"failed ({_summary(error)}): check free space and permissions, then "
                "run the same command again; it resumes from the newest complete "
                "checkpoint."
            ) from error


def newest(workdir: str | pathlib.Path, name: str = DIRECTORY) -> int | None:
    """Return the step of a run's newest complete checkpoint, or None.

    The names of folders tell: nothing is opened, and the run may go on.
    """
    with contextlib.suppress(OSError):
        found = os.listdir(_directory(workdir, name))
        return max((int(step) for step in found if step.isdecimal()), default=None)
    return None


def checksums_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    """Return the file of a run's checkpoint that identifies the content of the rest."""
    return _directory(workdir, DIRECTORY) / str(step) / checksums.FILE


def newest_record(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """Read what `save` has written beside the arrays of a run's newest checkpoint.

    None where there is none, or it is damaged, which reading the rest will tell.
    """
    step = newest(workdir)
    if step is None:
        return None
    folder = _directory(workdir, DIRECTORY) / str(step)
    if checksums.damaged(folder, (_META,)):
        return None
    return json.loads((folder / _META / "metadata").read_bytes())


def restore_policy(
    workdir: str | pathlib.Path, step: int | None = None
) -> tuple[params_lib.Params, model_config.ModelConfig, int]:
    """Read the policy of a run and nothing else, of a step; None: of the newest.

    Returns:
      The policy, layers stacked, on the first device; its architecture; its step.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from_json = model_config.ModelConfig.from_json
    params, record, _ = restore_trained(
        workdir,
        DIRECTORY,
        step,
        lambda model, dtype: params_lib.abstract(from_json(model), dtype),
    )
    return params, from_json(record["model"]), record["step"]


def restore_trained(
    workdir: str | pathlib.Path,
    name: str,
    step: int | None,
    describe: Callable[[dict[str, Any], str], _Tree],
    item: str = "",
) -> tuple[_Tree, dict[str, Any], dict[str, np.ndarray]]:
    """Read what was trained, of a run that may still be going on.

    The directory `name` lies in the run's; a `step` of None is the newest. `describe`
    takes the architecture's JSON form and a dtype, and returns a tree of
    `jax.ShapeDtypeStruct`s. The `item` is of `save`'s `more`: arrays whose shapes and
    dtypes stand in the driver's record as `arrays`, if they do.

    Returns:
      The tree, on the first device; the record with `step`, `model` and `driver`; and
      the item's arrays.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    directory = _directory(workdir, name)
    if not directory.is_dir():
        raise CheckpointError(
            f"{workdir} holds no {name}: give the --workdir of a run."
        )
    # Neither creates nor deletes.
    options = ocp.CheckpointManagerOptions(create=False, max_to_keep=None)
    made = ocp.CheckpointManager(directory, options=options)
    with contextlib.closing(made) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise CheckpointError(
                f"{directory} holds no complete checkpoint: let the run reach one "
                "(checkpoint.every RL steps)."
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(
                f"step={step} has no checkpoint in {directory}: there are "
                f"{', '.join(map(str, steps))}."
            )
        items = (_META, _POLICY, item) if item else (_META, _POLICY)
        _check_whole(directory, step, items)
        read = _Reader(manager, directory, step)
        record = read.record
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: leaf.update(sharding=first),
            describe(record["model"], record["param_dtype"]),
        )
        return read.trees({_POLICY: target})[_POLICY], record, read.arrays(item)


def _directory(workdir: str | pathlib.Path, name: str) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / name


class _Reader:
    """Reads items of a checkpoint that is known to be whole.

    Attributes:
      record: what `save` has written beside the arrays.
    """

    def __init__(
        self, manager: ocp.CheckpointManager, directory: pathlib.Path, step: int
    ):
        self._manager, self._directory, self._step = manager, directory, step
        self.record = self._read({_META: ocp.args.JsonRestore()})[_META]

    def trees(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Read trees of arrays by their items' names, as `wanted` describes them.

        Leaves that are None may be others than in the version that wrote: a setting
        that came later is absent there.
        """
        folder, asked = self._directory / str(self._step), {}
        for name, tree in wanted.items():
            ask = functools.partial(train_state.written_like, folder / name, tree)
            like = self._try(ask)
            asked[name] = ocp.args.StandardRestore(like)
        found = self._read(asked)
        return {k: train_state.restored(found[k], tree) for k, tree in wanted.items()}

    def arrays(self, item: str) -> dict[str, np.ndarray]:
        """Read an item of NumPy arrays, which the driver's record describes."""
        kinds = self.record["driver"].get("arrays", {}) if item else {}
        arrays = {key: np.empty(n, jnp.dtype(kind)) for key, (n, kind) in kinds.items()}
        # Orbax takes no empty ones.
        filled = {key: array for key, array in arrays.items() if array.size}
        return arrays | (self.trees({item: filled})[item] if filled else {})

    def _read(self, items: dict[str, Any]) -> Any:
        args = ocp.args.Composite(**items)
        return self._try(lambda: self._manager.restore(self._step, args=args))

    def _try(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        # All of them: Orbax raises an `Exception` as such, too.
        except Exception as error:
            found = _damaged(self._directory, self._step, _summary(error))
        # What Orbax has begun to read would complain at the interpreter's end.
        gc.collect()
        raise found


def _check_whole(
    directory: pathlib.Path, step: int, items: Collection[str] = ()
) -> None:
    """Compare the checksums of a checkpoint's files; of all, unless items are named.

    Raises:
      DamagedError: one is not what was written, or there are no checksums.
    """
    name = checksums.damaged(directory / str(step), items)
    if name == checksums.FILE:
        why = f"it has no whole {name}, which checkpoints of earlier versions lack"
        raise _damaged(directory, step, why)
    if name:
        raise _damaged(directory, step, f"{name} is not what was written")


def _damaged(directory: pathlib.Path, step: int, why: str) -> DamagedError:
    return DamagedError(
        f"the checkpoint of step {step} could not be read ({why}): it is damaged. "
        f"Delete {directory / str(step)} to go on from the checkpoint before it."
    )


def _shapes(params: Any, opt_state: Any) -> dict[str, list[int]]:
    both = {_POLICY: params, _OPTIMIZER: opt_state}
    leaves = jax.tree_util.tree_leaves_with_path(both)
    return {jax.tree_util.keystr(path): list(np.shape(leaf)) for path, leaf in leaves}


def _check_shapes(
    step: int, saved: dict[str, list[int]], wanted: dict[str, list[int]]
) -> None:
    paths = {*saved, *wanted}
    differing = [path for path in paths if saved.get(path) != wanted.get(path)]
    if differing:
        path = min(differing)
        raise CheckpointError(
            f"the checkpoint of step {step} is of another model or optimizer: "
            f"{path} is {saved.get(path, 'absent')} there and "
            f"{wanted.get(path, 'absent')} here ({len(differing)} arrays differ). Use "
            "the settings that it was written with, or another --workdir."
        )


def _summary(error: BaseException) -> str:
    """Return the first line of what caused an error; of a long one both its ends."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip() or "no message").splitlines()[0]
    short = line if len(line) < 300 else f"{line[:60]} ... {line[-200:]}"
    return f"{type(error).__name__}: {short}"
