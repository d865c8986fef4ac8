"""The record of a run: `metrics.jsonl`, one JSON object per RL step, and sinks of it.

Every `Sink` gets the rows, too: TensorBoard, and others (`sinks`).

Lines are complete or absent: each is one append, forced to disk before `write` returns.
JSON has no words for non-finite numbers; they are written as the strings "NaN",
"Infinity" and "-Infinity", and `read` turns these back into numbers.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from tlt_jax.models.formats import json_file
from tlt_jax.runtime import failures
from tlt_jax.workdir import record_keys

FILE = "metrics.jsonl"

# Names that stay (`record_keys`). Others are welcome: `group/name` in lower case.
NAMES = frozenset(key.name for key in record_keys.TRAINING if key.stays)
# Completions of a step that sinks get.
_SAMPLES = 4
_NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9][a-z0-9_@.]*")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Value = float | int | str | bool | None | list


class MetricsError(failures.UserError):
    """The record cannot be written or read."""


class Sink(Protocol):
    """Another place where rows go."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take a row's numbers; of sequences each item has its own name."""

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Take some of a step's completions, as `rollouts/` has them."""

    def close(self) -> None:
        """Complete it."""


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends rows to a run's record. Use as a context manager, or call `close`.

    Attributes:
      sinks: where else rows go; closed with this.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        first_step: int = 0,
        sinks: Sequence[Sink] = (),
    ):
        """Open `<workdir>/metrics.jsonl` to go on at `first_step`.

        Rows of that step and later ones, which a killed process wrote after its last
        checkpoint, are dropped: they will be written again. A half-written last line is
        dropped too. Both are logged. Every row that is on disk goes to the sinks.

        Raises:
          MetricsError: another process writes here, or the file is damaged.
        """
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE
        self._file = _open_locked(self._path)
        try:
            self._last_step = _drop_rows(self._file, self._path, first_step)
        except MetricsError:
            os.close(self._file)
            raise
        self.sinks = list(sinks)

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and force it to disk.

        Args:
          row: `step`, larger than the last row's, and values by name: numbers, strings,
            flags, None, or sequences of numbers; NumPy and JAX scalars and vectors too.

        Raises:
          ValueError: a name or a value is not allowed, or `step` does not advance.
          MetricsError: the row could not be written (disk full, ...); none of it was.
        """
        values = {name: _plain(name, value) for name, value in row.items()}
        step = values.get("step")
        if type(step) is not int or step <= self._last_step:
            raise ValueError(
                f"step={step!r} does not follow {self._last_step}: every row has an "
                "integer step larger than the one before."
            )
        line = json.dumps({k: _encode(v) for k, v in values.items()}, allow_nan=False)
        self._append(line.encode() + b"\n")
        self._last_step = step
        numbers = _numbers(values)
        for sink in self.sinks:
            sink.write(step, numbers)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Give the sinks a few completions of a step, from the best to the worst."""
        ranked = sorted(records, key=lambda record: -record["reward"])
        few = min(_SAMPLES, len(ranked))
        places = [i * (len(ranked) - 1) // max(few - 1, 1) for i in range(few)]
        for sink in self.sinks:
            sink.samples(step, [ranked[place] for place in places])

    def close(self) -> None:
        """Close the file, and the sinks."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        sinks, self.sinks = self.sinks, []
        for sink in sinks:
            sink.close()

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written < len(data):
                # The rest does not fit; asking for it gives the reason.
                os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise MetricsError(
                f"{self._path} could not be written ({error.strerror}): make room, "
                "then run the same command again; it resumes from the newest "
                "checkpoint."
            ) from error


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Read all complete rows of a run, which may still be going on.

    A half-written last line is left out.

    Raises:
      MetricsError: there is no record, or a line is damaged.
    """
    path = pathlib.Path(workdir) / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MetricsError(
            f"{path} does not exist: give the --workdir of a run."
        ) from error
    return [row for row, _ in _rows(data, path)]


def _rows(data: bytes, path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
    """Return the complete rows of a file's content, with their lines."""
    *lines, _ = data.split(b"\n")
    rows: list[tuple[dict[str, Any], bytes]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json_file.parse(line)
            step = row["step"]
            if type(step) is not int or not _last(rows) < step < 2**63:
                raise ValueError(f"step={step!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise MetricsError(
                f"{path}, line {number} is damaged: delete that line, or restore the "
                "file."
            ) from error
        rows.append(({k: _decode(v) for k, v in row.items()}, line + b"\n"))
    return rows


def _last(rows: Sequence[tuple[Mapping[str, Any], bytes]]) -> int:
    """Return the step of the last row, or -1."""
    return rows[-1][0]["step"] if rows else -1


def _open_locked(path: pathlib.Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise MetricsError(
            f"another process writes {path}: wait for it, end it, or use another "
            "--workdir."
        ) from error
    return file


def _drop_rows(file: int, path: pathlib.Path, first_step: int) -> int:
    """Cut the file before `first_step`; return the last step kept, or -1."""
    data = os.pread(file, os.fstat(file).st_size, 0)
    rows = _rows(data, path)
    before = itertools.takewhile(lambda one: one[0]["step"] < first_step, rows)
    kept = list(before)
    half = len(data) - sum(len(line) for _, line in rows)
    if half:
        logging.warning("%s ended in half a line (%d bytes): dropped.", path, half)
    if dropped := len(rows) - len(kept):
        told = "%s: dropped %d rows from step %d on; they will be written again."
        logging.warning(told, path, dropped, first_step)
    os.ftruncate(file, sum(len(line) for _, line in kept))
    os.fsync(file)
    return _last(kept)


def _plain(name: str, value: Any) -> Value:
    """Check a name and turn its value into plain Python."""
    if name not in NAMES and not _NAME.fullmatch(name):
        raise ValueError(
            f"metric name {name!r}: use group/name in lower case, such as reward/mean."
        )
    if value is None or isinstance(value, str | bool):
        return value
    array = np.asarray(value)
    if array.ndim > 1 or array.dtype.kind not in "biuf":
        if array.dtype.name != "bfloat16":
            raise ValueError(
                f"metric {name}={value!r}: give a number, a string, or a sequence of "
                "numbers."
            )
        array = array.astype(np.float32)
    return array.tolist()


def _encode(value: Value) -> Any:
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(k for k, v in _NON_FINITE.items() if str(v) == str(value))
    return value


def _decode(value: Any) -> Value:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _numbers(values: Mapping[str, Value]) -> dict[str, float]:
    """Return the numbers of a row; of sequences each item has its own name."""
    out = {}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items):
            if isinstance(item, bool | int | float) and name != "step":
                out[f"{name}/{i}" if isinstance(value, list) else name] = float(item)
    return out
