"""Texts with the target's features, kept on disk.

A shard is a directory of plain arrays, several texts end to end. It gets its name when
it is complete, and is mapped, not read: memory holds what a batch takes.
"""

import os
import pathlib
import shutil
from collections.abc import Container, Sequence

import numpy as np

from tlt_jax.specdec.texts import arrays as text_arrays
from tlt_jax.specdec.texts import layout

# Columns of `arrays.pack`'s table of texts in the file `index`, and back.
_IN_FILE, _PACKED = [0, 2, 3, 1], [0, 3, 1, 2]


class Shards:
    """Texts in the order of their ids, appended shard by shard."""

    def __init__(self, directory: str | os.PathLike, dtype: str = "bfloat16"):
        """Open or make the directory; what a killed process left unfinished is removed.

        For `dtype` see `arrays.dtype_of`.
        """
        self._dtype = text_arrays.dtype_of(dtype)
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("*.partial"):
            shutil.rmtree(path)
        # Views of the files, in the order of their ids.
        self._records: list[layout.Record] = []
        self._ids_of: dict[pathlib.Path, list[int]] = {}
        self._next = 0
        for path in sorted(self._directory.glob("shard_*")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def text_ids(self) -> list[int]:
        """Ids of the texts, rising."""
        return [record.text_id for record in self._records]

    @property
    def lengths(self) -> np.ndarray:
        """`[num_texts] int64`, tokens of every text."""
        return np.array([len(record.tokens) for record in self._records], np.int64)

    @property
    def response_starts(self) -> np.ndarray:
        """`[num_texts] int64`, where every text's response starts."""
        return np.array([record.response_start for record in self._records], np.int64)

    def append(self, records: Sequence[layout.Record]) -> None:
        """Write a shard of one record at least.

        Raises:
          ValueError: an id is there already, or arrays do not fit together.
        """
        known = set(self.text_ids)
        for record in records:
            layout.check(record, known)
            known.add(record.text_id)
        widths = text_arrays.widths(records[0])
        kept = [text_arrays.kept(record, self._dtype) for record in records]
        arrays = text_arrays.pack(kept, widths, self._dtype)
        arrays["index"] = np.ascontiguousarray(arrays.pop("texts")[:, _IN_FILE])
        if not widths[1]:
            del arrays["features"]
        path = self._directory / f"shard_{self._next:06d}"
        partial = path.with_suffix(".partial")
        partial.mkdir()
        for name, array in arrays.items():
            with open(partial / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        partial.rename(path)
        self._open(path)

    def read(self, index: int) -> layout.Record:
        """Read the text at `index`; its features are views of the file."""
        return self._records[index]

    def drop(self, text_ids: Container[int]) -> None:
        """Delete the shards that hold no other texts than these."""
        for path, ids in list(self._ids_of.items()):
            if all(text_id in text_ids for text_id in ids):
                # The name goes first: a shard of which files are gone is none.
                gone = path.rename(path.with_suffix(".partial"))
                shutil.rmtree(gone)
                del self._ids_of[path]
                self._records = [r for r in self._records if r.text_id not in ids]

    def _open(self, path: pathlib.Path) -> None:
        arrays = {
            file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")
        }
        if arrays["hidden"].dtype != text_arrays.bits_of(self._dtype):
            raise ValueError(
                f"{path} holds features of another dtype than {self._dtype}: name the "
                "one that it was written with, or another directory."
            )
        arrays["texts"] = arrays.pop("index")[:, _PACKED]
        arrays.setdefault("features", arrays["hidden"][:, :0])
        records = text_arrays.unpack(arrays, self._dtype.name)
        self._records += records
        self._records.sort(key=lambda record: record.text_id)
        self._ids_of[path] = [record.text_id for record in records]
        self._next = int(path.name.removeprefix("shard_")) + 1
