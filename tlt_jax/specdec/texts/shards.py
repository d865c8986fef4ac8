"""Texts with the target's features, kept on disk, and batches of them.

A shard is a directory of plain arrays, several texts end to end. It gets its name when
it is complete, and is mapped, not read: memory holds what a batch takes.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Container, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from tlt_jax.specdec.training import unroll

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Record:
    """A text and what the target made of it.

    Attributes:
      text_id: unique in its buffer; decides the order of texts.
      tokens: `[n] int32`, prompt and response.
      response_start: index of the response's first token, at least 1.
      hidden: `[n, D]`, last features after the final norm.
      features: `[n, n_layers * D]`, or None where `hidden` is the feature.
      key: `[2] uint32`, the noise key that the response was drawn with.
      version: of the target's weights.
    """

    text_id: int
    tokens: np.ndarray
    response_start: int
    hidden: np.ndarray
    features: np.ndarray | None
    key: np.ndarray
    version: int = 0


class Texts(Protocol):
    """What `plan` and `lay_out` read: texts by their index.

    Attributes:
      lengths: `[num_texts] int64`, tokens of every text.
      response_starts: `[num_texts] int64`, where every text's response starts.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def response_starts(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Read the text at `index`."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A text in a row: its first `num_tokens` tokens and some of its bases.

    Attributes:
      index: of the text in the buffer.
      num_tokens: tokens laid out.
      first_base: position of the first base.
      num_bases: bases, one after the other.
    """

    index: int
    num_tokens: int
    first_base: int
    num_bases: int


@dataclasses.dataclass(frozen=True, order=True)
class _Entry:
    """Where a text is."""

    text_id: int
    shard: int
    row: int
    first: int
    length: int
    response_start: int


class HiddenBuffer:
    """Texts in the order of their ids, appended shard by shard."""

    def __init__(self, directory: str | os.PathLike, dtype: str = "bfloat16"):
        """Open or make a buffer; what a killed process left half written is removed.

        Args:
          directory: of the buffer.
          dtype: features are kept in it: `float32` or `bfloat16`.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: use {' or '.join(DTYPES)}.")
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

    def append(self, records: Sequence[Record]) -> None:
        """Write a shard.

        Args:
          records: at least one, of ids that are not there yet.

        Raises:
          ValueError: an id is there already, or arrays do not fit together.
        """
        known = {entry.text_id for entry in self._index}
        for record in records:
            check(record, known)
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

    def read(self, index: int) -> Record:
        """Read the text at `index`; its features are views of the file."""
        entry = self._index[index]
        arrays = self._shards[entry.shard]
        here = slice(entry.first, entry.first + entry.length)
        features = arrays.get("features")
        return Record(
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


def num_bases(length: int, response_start: int) -> int:
    """Count the bases of a text: positions t whose token t + 2 is the response's.

    The first has t = response_start - 2, as drafting starts there; of a prompt of one
    token it is t = 0.
    """
    return max(length - max(response_start, 2), 0)


class Rows:
    """Rows that texts are placed in, each text in the first row with room."""

    def __init__(
        self,
        row_tokens: int,
        row_bases: int,
        *,
        max_rows: int | None = None,
        num_open: int | None = None,
    ):
        """Begin without a row.

        Args:
          row_tokens, row_bases: T and M.
          max_rows: None: as many as it takes.
          num_open: newest rows that are looked at when another one is begun; None:
            all. With a number, placing takes linear time.
        """
        self.rows: list[list[Span]] = []
        self._size = (row_tokens, row_bases)
        self._room: list[tuple[int, int]] = []
        self._max_rows, self._num_open = max_rows, num_open
        self._first_open = 0

    def place(self, span: Span) -> bool:
        """Place a text; say whether there was room."""
        tokens, bases = span.num_tokens, span.num_bases
        fits = (
            i
            for i in range(self._first_open, len(self.rows))
            if self._room[i][0] >= tokens and self._room[i][1] >= bases
        )
        chosen = next(fits, len(self.rows))
        if chosen == len(self.rows):
            if chosen == self._max_rows:
                return False
            self.rows.append([])
            self._room.append(self._size)
            if self._num_open is not None:
                self._first_open = max(self._first_open, chosen + 1 - self._num_open)
        self.rows[chosen].append(span)
        left = self._room[chosen]
        self._room[chosen] = (left[0] - tokens, left[1] - bases)
        return True


def span_of(
    index: int,
    length: int,
    response_start: int,
    *,
    row_tokens: int,
    row_bases: int,
    rng: np.random.Generator | None,
) -> Span | None:
    """Cut a text to what a row can hold.

    Args:
      index: of the text.
      length, response_start: the text's.
      row_tokens, row_bases: T and M. A text longer than T loses its end; of one with
        more than M bases a run is taken.
      rng: draws the run; None: the first.

    Returns:
      The span, or None if no base is left.
    """
    length = min(int(length), row_tokens)
    there = num_bases(length, int(response_start))
    if not there:
        return None
    taken = min(there, row_bases)
    skipped = 0 if rng is None else int(rng.integers(there - taken + 1))
    return Span(index, length, max(int(response_start) - 2, 0) + skipped, taken)


def plan(
    texts: Texts,
    indices: Sequence[int],
    *,
    row_tokens: int,
    row_bases: int,
    num_rows: int,
    seed: tuple[int, ...] | None,
) -> list[list[list[Span]]]:
    """Lay texts out over batches, each in one row, the first with room.

    Args:
      texts: the texts.
      indices: which of them; those without a base are left out.
      row_tokens, row_bases: T and M, see `span_of`.
      num_rows: B.
      seed: numbers of the order and of the runs; None: the order given, and first runs.

    Returns:
      Batches of `num_rows` rows of spans; rows of the last may be empty.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    order = np.asarray(indices, np.int64)
    if rng is not None:
        order = rng.permutation(order)
    # Rows that are nearly full are looked at no more, so that a plan takes linear time.
    placed = Rows(row_tokens, row_bases, num_open=4 * num_rows)
    sizes = {"row_tokens": row_tokens, "row_bases": row_bases}
    lengths, starts = texts.lengths, texts.response_starts
    for index in order.tolist():
        span = span_of(index, lengths[index], starts[index], rng=rng, **sizes)
        if span is not None:
            placed.place(span)
    rows = placed.rows + [[]] * (-len(placed.rows) % num_rows)
    return [rows[i : i + num_rows] for i in range(0, len(rows), num_rows)]


def lay_out(
    texts: Texts,
    rows: Sequence[Sequence[Span]],
    *,
    row_tokens: int,
    row_bases: int,
) -> unroll.Batch:
    """Make a batch of one of `plan`'s.

    Args:
      texts: the texts; each is read once and let go before the next one is.
      rows: of the batch.
      row_tokens, row_bases: as for `plan`.

    Returns:
      The batch, in host memory.
    """
    batch = None
    for b, spans in enumerate(rows):
        first = base = 0
        for number, span in enumerate(spans):
            record = texts.read(span.index)
            if batch is None:
                batch = _empty_batch(record, len(rows), row_tokens, row_bases)
            here = (b, slice(first, first + span.num_tokens))
            batch.tokens[here] = record.tokens[: span.num_tokens]
            batch.positions[here] = np.arange(span.num_tokens)
            batch.segment[here] = number
            batch.hidden[here] = record.hidden[: span.num_tokens]
            if batch.features is not None:
                batch.features[here] = record.features[: span.num_tokens]
            there = (b, slice(base, base + span.num_bases))
            batch.bases[there] = first + span.first_base + np.arange(span.num_bases)
            batch.valid[there] = True
            batch.keys[there] = record.key
            first, base = first + span.num_tokens, base + span.num_bases
    if batch is None:
        batch = _empty_batch(texts.read(0), len(rows), row_tokens, row_bases)
    return batch


def _empty_batch(
    record: Record, num_rows: int, row_tokens: int, row_bases: int
) -> unroll.Batch:
    """Make a batch of padding, for features as wide as a record's."""

    def features(array):
        return np.zeros((num_rows, row_tokens, array.shape[1]), array.dtype)

    def ints(width, fill=0):
        return np.full((num_rows, width), fill, np.int32)

    return unroll.Batch(
        tokens=ints(row_tokens),
        positions=ints(row_tokens),
        segment=ints(row_tokens, -1),
        features=None if record.features is None else features(record.features),
        hidden=features(record.hidden),
        bases=ints(row_bases),
        valid=np.zeros((num_rows, row_bases), bool),
        keys=np.zeros((num_rows, row_bases, 2), np.uint32),
    )


def check(record: Record, known: Container[int]) -> None:
    """Refuse a record whose arrays do not fit together.

    Args:
      record: of any origin.
      known: ids that are taken.

    Raises:
      ValueError: its id is taken, or a shape is wrong.
    """
    length = len(record.tokens)
    if record.text_id in known:
        raise ValueError(f"text_id={record.text_id} is in the buffer already.")
    if not 1 <= record.response_start <= length:
        raise ValueError(
            f"text {record.text_id} has response_start={record.response_start} in "
            f"{length} tokens: a prompt has at least one token."
        )
    for name in ("hidden", "features"):
        array = getattr(record, name)
        if array is not None and (array.ndim != 2 or len(array) != length):
            raise ValueError(
                f"text {record.text_id} has {name} of shape {array.shape} for {length} "
                "tokens: give one row a token."
            )
