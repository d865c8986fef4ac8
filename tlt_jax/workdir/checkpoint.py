"""Checkpoints of a run: policy, optimizer state and what the driver must remember.

One directory per step below `<workdir>/checkpoints`. A checkpoint appears under its
final name only when it is complete, so a killed process leaves none that is half
written. The policy, the optimizer state and the JSON record are separate items: an
export reads the policy alone. The record holds a checksum of every array, and one of
itself; both are compared when it is read.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tlt_jax.models import config as model_config
from tlt_jax.models import params as params_lib
from tlt_jax.runtime import failures
from tlt_jax.workdir import checksums

DIRECTORY = "checkpoints"
_POLICY, _OPTIMIZER, _META = "policy", "optimizer", "meta"
# In the record: of every array, and of the rest of it.
_SUMS, _OWN_SUM = "checksums", "sha256"
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
        over for the one before and removed. Several processes, which may see different
        damage, refuse it in any case.

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
        self._pass_over = pass_over if alone or jax.process_count() == 1 else None
        processes = ocp.options.MultiprocessingOptions()
        if alone:
            own = jax.process_index()
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
                    create_directories_asynchronously=False
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
            _SUMS: checksums.of(trees),
        }
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items[_META] = ocp.args.JsonSave(record | {_OWN_SUM: _sum_of(record)})
        # What is wrong with the one before shall not be said of this one.
        self.wait()
        self._begun = step
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until every checkpoint is complete on disk.

        Raises:
          CheckpointError: one could not be written.
        """
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
        steps = sorted(self._manager.all_steps())
        while steps:
            step = steps.pop()
            try:
                found = self._restore(step, params, opt_state, item)
            except DamagedError as error:
                if self._pass_over is None or not steps:
                    raise
                told = str(error).partition(" Delete ")[0]
                self._pass_over(
                    f"{told} That of step {steps[-1]} is taken instead, and this one "
                    "removed."
                )
            else:
                self.delete_after(step)
                return found
        return None

    def _restore(self, step: int, params: Any, opt_state: Any, item: str) -> Restored:
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


def record_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    """Return the file of a run's checkpoint that holds the checksums of the others."""
    return _directory(workdir, DIRECTORY) / str(step) / _META / "metadata"


def newest_record(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """Read what `save` has written beside the arrays of a run's newest checkpoint.

    None where there is none, or it is damaged, which reading the rest will tell.
    """
    step = newest(workdir)
    if step is None:
        return None
    try:
        record = json.loads(record_path(workdir, step).read_bytes())
    except (OSError, ValueError):
        return None
    return record if _is_whole(record) else None


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
    """Reads a checkpoint's items and compares their checksums.

    Attributes:
      record: what `save` has written beside the arrays.
    """

    def __init__(
        self, manager: ocp.CheckpointManager, directory: pathlib.Path, step: int
    ):
        self._manager, self._step = manager, step
        self._path = directory / str(step)
        self.record = self._read({_META: ocp.args.JsonRestore()})[_META]
        if isinstance(self.record, dict) and not {_OWN_SUM, _SUMS} & {*self.record}:
            raise CheckpointError(
                f"the checkpoint of step {step} was written by another version of "
                "tlt_jax, which kept no checksums: go on with that version, or begin "
                "in another --workdir."
            )
        if not _is_whole(self.record):
            raise self._damaged(f"{_META} does not have its own checksum")

    def trees(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Read trees of arrays by their items' names, as `wanted` describes them."""
        found = self._read({k: ocp.args.StandardRestore(v) for k, v in wanted.items()})
        trees = {name: found[name] for name in wanted}
        paths, told = checksums.named(trees), self.record[_SUMS]
        found = checksums.of(trees, {path: told.get(path, "") for path in paths})
        if wrong := [path for path in found if found[path] != told.get(path)]:
            raise self._damaged(f"{wrong[0]} does not have its checksum")
        return trees

    def arrays(self, item: str) -> dict[str, np.ndarray]:
        """Read an item of NumPy arrays, which the driver's record describes."""
        kinds = self.record["driver"].get("arrays", {}) if item else {}
        arrays = {key: np.empty(n, jnp.dtype(kind)) for key, (n, kind) in kinds.items()}
        # Orbax takes no empty ones.
        filled = {key: array for key, array in arrays.items() if array.size}
        return arrays | (self.trees({item: filled})[item] if filled else {})

    def _read(self, items: dict[str, Any]) -> Any:
        try:
            return self._manager.restore(self._step, args=ocp.args.Composite(**items))
        # Of files that are not what they were, readers may say anything.
        except Exception as error:
            raise self._damaged(_summary(error)) from error

    def _damaged(self, why: str) -> DamagedError:
        return DamagedError(
            f"the checkpoint of step {self._step} could not be read ({why}): it is "
            f"damaged. Delete {self._path} to go on from the checkpoint before it."
        )


def _is_whole(record: Any) -> bool:
    """Say whether a record has its own checksum."""
    return isinstance(record, dict) and record.get(_OWN_SUM) == _sum_of(record)


def _sum_of(record: dict[str, Any]) -> str:
    """Digest a record as it comes back from JSON, without its own digest."""
    record = {key: value for key, value in record.items() if key != _OWN_SUM}
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _shapes(params: Any, opt_state: Any) -> dict[str, list[int]]:
    both = checksums.named({_POLICY: params, _OPTIMIZER: opt_state})
    return {path: list(np.shape(leaf)) for path, leaf in both.items()}


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


def _summary(error: Exception) -> str:
    """Return the first line of an error; of a long one the end, where the cause is."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {line if len(line) < 300 else '...' + line[-240:]}"
