"""Arrays set aside on disk through tensorstore while host memory is short."""

import contextlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorstore

# What tensorstore makes of a full, missing or forbidden directory.
_FAILURES = (OSError, ValueError, RuntimeError)
_PREFIX = "text_"


class SpillError(RuntimeError):
    """Something could not be written or read back; the message names the directory."""


class Spill:
    """A directory of entries, each the bytes of some arrays end to end.

    It belongs to one process: entries that another one left there are removed.
    """

    def __init__(self, directory: str | os.PathLike):
        """Take a directory for entries alone; the first one written makes it."""
        self.directory = pathlib.Path(directory).absolute()
        self.clear()
        # Entries need not outlive the process, so nothing waits for the disk.
        self._store = tensorstore.KvStore.open(
            {
                "driver": "file",
                "path": f"{self.directory}/",
                "context": {"file_io_sync": False},
            }
        ).result()

    def write(self, number: int, arrays: Sequence[np.ndarray]) -> None:
        """Write an entry; it is there as a whole or not at all.

        Raises:
          SpillError: it could not be written.
        """
        data = b"".join(np.ascontiguousarray(x).view(np.uint8).data for x in arrays)
        try:
            self._store.write(f"{_PREFIX}{number}", data).result()
        except _FAILURES as error:
            raise SpillError(f"writing to {self.directory} failed: {error}") from error

    def read(self, number: int, num_bytes: int) -> memoryview:
        """Read an entry back.

        Raises:
          SpillError: it is not there any more, or not of `num_bytes`.
        """
        try:
            data = self._store.read(f"{_PREFIX}{number}").result().value
        except _FAILURES as error:
            raise SpillError(f"reading {self.directory} failed: {error}") from error
        if len(data) != num_bytes:
            raise SpillError(
                f"{self.directory}/{_PREFIX}{number} holds {len(data)} bytes, not "
                f"{num_bytes}: something else changes this directory."
            )
        return memoryview(data)

    def delete(self, number: int) -> None:
        """Remove an entry.

        Raises:
          SpillError: it could not be removed.
        """
        try:
            self._store.write(f"{_PREFIX}{number}", None).result()
        except _FAILURES as error:
            raise SpillError(f"deleting in {self.directory} failed: {error}") from error

    def clear(self) -> None:
        """Remove all entries; what cannot be removed stays."""
        for path in self.directory.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                path.unlink()
