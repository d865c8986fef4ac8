"""What a run is: its settings and the content of every file that it reads.

Both are written when a run begins (`config.json`, `inputs.json`) and into each of its
checkpoints, and compared when it is taken up again: a run that goes on with other data
or another model is another run. Of a recipe nothing is read but the settings, so they
are compared and not its text.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tlt_jax import config
from tlt_jax.runtime import distributed
from tlt_jax.settings import schema
from tlt_jax.workdir import checkpoint, files, metrics

SETTINGS, INPUTS = "config.json", "inputs.json"
# Settings that may change when a run is taken up again: none decides what is computed.
_FREE_ON_RESUME = (
    *("log.", "checkpoint.", "eval.", "reward.workers", "reward.timeout_s"),
    *("reward.memory_mb", "reward.placement"),
    *("workers.",),
)
_NUM_THREADS = 4
_SHOWN_DIGITS = 12

# By what they are for (data, model, drafter), each file's name and SHA-256, in order.
Digests = dict[str, list[list[str]]]


def claim(
    workdir: pathlib.Path,
    run: Any,
    inputs: Mapping[str, Sequence[pathlib.Path]],
    note: Callable[[str], None],
    group: distributed.Group | None = None,
) -> dict[str, Any]:
    """Compare the files that a run reads with those it has read before, or record them.

    Several processes, which may be of several machines, must have the same files.

    Every byte is read, about a second per GB; several files side by side. A run that
    has taken no step is bound to nothing. `note` is told a line where the run's new
    length changes what it computes.

    Returns:
      What a checkpoint keeps of it: the `settings`, and the `inputs` as `Digests`.

    Raises:
      schema.ConfigError: a file is not what it was; its name is told.
      ValueError: the processes have different files.
      files.WorkdirError: `inputs.json` cannot be written.
    """
    group = group or distributed.alone()
    found = digests(inputs)
    group.check_same("files to read", summary(found))
    return group.first("identity", lambda: _claim(workdir, run, found, note))


def _claim(workdir, run, found: Digests, note) -> dict[str, Any]:
    before = _recorded(workdir)
    for told in (before.get("inputs"), _read(workdir / INPUTS)):
        if told is not None and begun(workdir):
            check_inputs(workdir, told, found)
    if line := jump(before.get("settings"), run):
        note(line)
    with files.replacing(workdir / INPUTS) as file:
        file.write(json.dumps(found, indent=2) + "\n")
    return {"settings": schema.to_dict(run), "inputs": found}


def begun(workdir: pathlib.Path) -> bool:
    """Say whether the directory holds a run that has taken a step, or measured one."""
    # Of a step there is a record before there is any checkpoint.
    record = workdir / metrics.FILE
    is_written = record.is_file() and record.stat().st_size > 0
    return is_written or checkpoint.newest(workdir) is not None


def digests(inputs: Mapping[str, Sequence[pathlib.Path]]) -> Digests:
    """Digest files, by what they are for."""
    listed = [(role, path) for role, paths in inputs.items() for path in paths]
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        made = list(pool.map(_digest, [path for _, path in listed]))
    found: Digests = {role: [] for role in inputs}
    for (role, path), digest in zip(listed, made, strict=True):
        found[role].append([path.name, digest])
    return found


def summary(inputs: Digests) -> str:
    """Return 16 hex digits that identify what was read."""
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(workdir: pathlib.Path, before: Digests, now: Digests) -> None:
    """Refuse files whose content is not what it was.

    Raises:
      schema.ConfigError: naming the first of them.
    """
    for role, files_now in now.items():
        files_before = before.get(role, [])
        if len(files_before) != len(files_now):
            raise schema.ConfigError(
                f"{workdir} holds a run that has read {len(files_before)} files of its "
                f"{role} and finds {len(files_now)} now: restore them, or use another "
                "--workdir."
            )
        for (_, old), (name, new) in zip(files_before, files_now, strict=True):
            if old != new:
                raise schema.ConfigError(
                    f"{workdir} holds a run that has read another {name} ({role}; "
                    f"SHA-256 {old[:_SHOWN_DIGITS]}... then, {new[:_SHOWN_DIGITS]}... "
                    "now): restore the file, or use another --workdir."
                )


def check_settings(
    workdir: pathlib.Path, run: Any, load: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Refuse settings other than those that the directory's run has.

    They are compared with `config.json`, and with what its newest checkpoint says.
    `load` makes a run of plain values.

    Raises:
      schema.ConfigError: naming the first that differs.
    """
    if not begun(workdir):
        return
    path = workdir / SETTINGS
    if path.exists():
        _check_same(
            workdir, path, lambda: load(dict(json.loads(path.read_text()))), run
        )
    if (told := _recorded(workdir).get("settings")) is not None:
        kept = "the newest checkpoint's record"
        _check_same(workdir, kept, lambda: load(told), run)


def _check_same(
    workdir: pathlib.Path, source: object, read: Callable[[], Any], run: Any
) -> None:
    try:
        before = read()
    except (ValueError, TypeError) as error:
        raise schema.ConfigError(
            f"{source} cannot be read ({error}): restore it, or use another --workdir."
        ) from error
    changed = {
        key: values
        for key, values in config.differences(before, run).items()
        if key != "num_steps" and not key.startswith(_FREE_ON_RESUME)
    }
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise schema.ConfigError(
            f"{workdir} holds a run with {key}={old!r}, not {new!r}{more}: use another "
            "--workdir, or the same settings to resume."
        )


def jump(before: Mapping[str, Any] | None, run: Any) -> str:
    """Say in a line that a falling learning rate jumps, or nothing.

    A schedule falls to 0 at the last step, so another number of steps is another one.
    """
    old, new = before and before["num_steps"], run.num_steps
    schedule = run.optimizer.schedule
    if before is None or old == new or schedule == "constant":
        return ""
    return (
        f"optimizer.schedule={schedule!r} falls to 0 at num_steps, {new} and no longer "
        f"{old}: from here on the learning rate is that of a run of {new} steps."
    )


def _recorded(workdir: pathlib.Path) -> dict[str, Any]:
    """Return what the newest checkpoint keeps of the run's identity, if it says so."""
    return (checkpoint.newest_record(workdir) or {}).get("driver", {})


def _read(path: pathlib.Path) -> Digests | None:
    """Read `inputs.json`; of one that is not there or damaged, None."""
    try:
        told = json.loads(path.read_text())
        return {role: [[str(a), str(b)] for a, b in told[role]] for role in told}
    except (OSError, ValueError, TypeError):
        return None
