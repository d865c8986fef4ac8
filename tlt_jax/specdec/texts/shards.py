"""Texts with the target's features, kept on disk.

A shard is a directory of plain arrays, several texts end to end. It gets its name when
it is complete, and is mapped, not read: memory holds what a batch takes.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tlt_jax.specdec.texts import layout


@dataclasses.dataclass(frozen=True, order=True)
class _Entry:
    """Where a text is."""

    text_id: int
    shard: int
    row: int
    first: int
    length: int
    response_start: int


class Shards:
    """Texts in the order of their ids, appended shard by shard."""

    def __init__(self, directory: str | os.PathLike, dtype: str = "bfloat16"):
        """Open or make the directory; what a killed process left unfinished is removed.

        Args:
          directory: of the texts.
          dtype: features are kept in it: `float32` or `bfloat16`.
        """
        if dtype not in layout.DTYPES:
            raise ValueError(f"dtype={dtype!r}: use {' or '.join(layout.DTYPES)}.")
        self._directory = pathlib.Path(directory)
        self._dtype = np.dtype(jnp.dtype(dtype))
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("*.partial"):
            shutil.rmtree(path)
        self._index: list[_Entry] = []
        self._shards: list[dict[str, np.ndarray]] = []
        for path in sorted(self._directory.glob("shard_*")):
            self._open(path)
        self._index.sort()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def text_ids(self) -> list[int]:
        """Ids of the texts, rising."""
        return [entry.text_id for entry in self._index]

    @property
    def lengths(self) -> np.ndarray:
        """`[num_texts] int64`, tokens of every text."""
        return np.array([entry.length for entry in self._index], np.int64)

    @property
    def response_starts(self) -> np.ndarray:
        """`[num_texts] int64`, where every text's response starts."""
        return np.array([entry.response_start for entry in self._index], np.int64)

    def append(self, records: Sequence[layout.Record]) -> None:
        """Write a shard.

        Args:
          records: at least one, of ids that are not there yet.

        Raises:
          ValueError: an id is there already, or arrays do not fit together.
        """
        known = {entry.text_id for entry in self._index}
        for record in records:
            layout.check(record, known)
            known.add(record.text_id)
        arrays = {
            "tokens": np.concatenate([r.tokens for r in records]).astype(np.int32),
            "hidden": self._stored([r.hidden for r in records]),
            "index": np.array(
                [
                    (r.text_id, len(r.tokens), r.response_start, r.version)
                    for r in records
                ],
                np.int64,
            ),
            "keys": np.array([r.key for r in records], np.uint32),
        }
        if records[0].features is not None:
            arrays["features"] = self._stored([r.features for r in records])
        path = self._directory / f"shard_{len(self._shards):06d}"
        partial = path.with_suffix(".partial")
        partial.mkdir()
        for name, array in arrays.items():
            with open(partial / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        partial.rename(path)
        self._open(path)
        self._index.sort()

    def read(self, index: int) -> layout.Record:
        """Read the text at `index`; its features are views of the file."""
        entry = self._index[index]
        arrays = self._shards[entry.shard]
        here = slice(entry.first, entry.first + entry.length)
        features = arrays.get("features")
        return layout.Record(
            text_id=entry.text_id,
            tokens=np.asarray(arrays["tokens"][here]),
            response_start=entry.response_start,
            hidden=self._loaded(arrays["hidden"][here]),
            features=None if features is None else self._loaded(features[here]),
            key=np.asarray(arrays["keys"][entry.row]),
            version=int(arrays["index"][entry.row, 3]),
        )

    def _open(self, path: pathlib.Path) -> None:
        arrays = {
            file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")
        }
        wanted = np.dtype(np.uint16) if self._dtype.itemsize == 2 else self._dtype
        if arrays["hidden"].dtype != wanted:
            raise ValueError(
                f"{path} holds features of another dtype than {self._dtype}: name the "
                "one that it was written with, or another directory."
            )
        first = 0
        for row, (text_id, length, start, _) in enumerate(arrays["index"].tolist()):
            self._index.append(
                _Entry(text_id, len(self._shards), row, first, length, start)
            )
            first += length
        self._shards.append(arrays)

    def _stored(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """NumPy's files know no bfloat16: its bits are kept."""
        whole = np.concatenate(parts).astype(self._dtype)
        return whole.view(np.uint16) if self._dtype.itemsize == 2 else whole

    def _loaded(self, stored: np.ndarray) -> np.ndarray:
        return stored.view(self._dtype)
