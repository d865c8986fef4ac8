"""Texts with the target's features, as a run finishes them, in bounded memory.

Threads append while a trainer reads. What does not fit in host memory goes to disk in
the background, or is dropped: the least useful first, see
`retention.least_useful`.

A text's features are those of the target that wrote it, but a drafter is trained, as it
drafts, with the embedding and the head of the target as it is now. What it learns from
an older text is thus the law that today's head reads from yesterday's features: neither
version's own law, and as far from either as the weights moved in between (with a tied
head both ends move). `max_age` bounds how many versions that can be.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tlt_jax.specdec.texts import arrays as text_arrays
from tlt_jax.specdec.texts import layout, retention
from tlt_jax.specdec.texts import spill as spill_lib

# Texts are set aside from this share of the memory on, so that a new one finds room.
_SPILL_ABOVE = 0.75


class TextGoneError(LookupError):
    """A text was dropped, or could not be read back from disk."""


class View:
    """The texts that were there at one moment, in the order of their ids.

    Read by `layout.plan` and `lay_out`. It keeps nothing in memory: a text can
    go at any moment unless it is held.

    Attributes:
      text_ids, lengths, response_starts, versions: `[num_texts] int64`.
    """

    def __init__(self, buffer: "TextBuffer", entries: Sequence[retention.Entry]):
        """List entries of a buffer."""
        self._buffer = buffer
        self._entries = sorted(entries, key=lambda e: e.text_id)
        columns = ("text_id", "length", "response_start", "version")
        rows = [[getattr(e, name) for name in columns] for e in self._entries]
        table = np.array(rows, np.int64).reshape(-1, len(columns))
        self.text_ids, self.lengths, self.response_starts, self.versions = table.T

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> layout.Record:
        """Read the text at `index`, from memory or disk.

        Raises:
          TextGoneError: it is not there any more.
        """
        return self._buffer.read(self._entries[index])

    @contextlib.contextmanager
    def holding(self, indices: Sequence[int]) -> Iterator[bool]:
        """Keep texts while the context lasts; tell whether all are still there."""
        entries = [self._entries[i] for i in indices]
        with self._buffer.holding(entries) as num_there:
            yield num_there == len(entries)


class TextBuffer:
    """Texts of this step and of the ones before, shared by threads.

    Attributes:
      version: the newest of the target that is known of.
      num_bytes, num_disk_bytes: of texts in host memory, and on disk.
      spill_error: the first failure of the disk, or None.
      num_appended, num_dropped, num_spilled: texts so far. Dropped are those that the
        bounds left no room for, not those that were too old.
    """

    def __init__(
        self,
        max_bytes: int,
        dtype: str = "bfloat16",
        *,
        max_age: int = 1,
        spill_directory: str | os.PathLike | None = None,
        max_spill_bytes: int = 0,
        on_spill_error: Callable[[spill_lib.SpillError], None] | None = None,
    ):
        """Make an empty buffer.

        Args:
          max_bytes: of all texts in host memory; what a batch takes comes on top.
          dtype: see `arrays.dtype_of`.
          max_age: versions of the target that a text may be behind.
          spill_directory: of this process alone; what a killed one left there goes.
          max_spill_bytes: of all texts there; 0: nothing is written.
          on_spill_error: called once, at the first failure of the disk, from any
            thread. The buffer goes on without the disk and tries again from the next
            step on.

        Raises:
          ValueError: a bound or the dtype makes no sense.
        """
        self._dtype = text_arrays.dtype_of(dtype)
        if max_bytes < 1 or max_spill_bytes < 0 or max_age < 0:
            raise ValueError(
                f"max_bytes={max_bytes}, max_spill_bytes={max_spill_bytes}, "
                f"max_age={max_age}: give at least 1, 0 and 0."
            )
        if max_spill_bytes and spill_directory is None:
            raise ValueError(
                f"max_spill_bytes={max_spill_bytes} needs a spill_directory: name one, "
                "or give 0."
            )
        self.spill_error: spill_lib.SpillError | None = None
        self.num_appended = self.num_dropped = self.num_spilled = 0
        self._max_bytes, self._max_disk_bytes = max_bytes, max_spill_bytes
        self._max_age, self._on_spill_error = max_age, on_spill_error
        self._entries: dict[int, retention.Entry] = {}
        self._widths: tuple[int, int] | None = None
        self.version = self.num_bytes = self.num_disk_bytes = self._serial = 0
        self._trash: list[retention.Entry] = []
        self._changed = threading.Condition()
        self._closed, self._idle = False, True
        self._thread = self._spill = None
        if max_spill_bytes:
            self._spill = spill_lib.Spill(spill_directory)
            self._thread = threading.Thread(target=self._write_behind, daemon=True)
            self._thread.start()
        self._disk_works = self._thread is not None

    def __enter__(self) -> "TextBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._entries)

    def begin_step(self, version: int) -> None:
        """Say that the target has this version now; texts too old for it go."""
        with self._changed:
            if version > self.version:
                self.version = version
                self._disk_works = self._thread is not None
            for entry in list(self._entries.values()):
                if entry.version < version - self._max_age:
                    self._drop(entry)
            self._notify()

    def append(self, record: layout.Record) -> bool:
        """Take a copy of a text; never waits for the disk.

        A version newer than any before begins a step.

        Returns:
          Whether it was kept: it may be too old, have no position to learn from, or be
          the least useful one.

        Raises:
          ValueError: the id is there, or shapes do not fit together.
        """
        if record.version > self.version:
            self.begin_step(record.version)
        with self._changed:
            entry = self._new_entry(record)
            self.num_appended += 1
            if entry.version < self.version - self._max_age or not entry.num_bases:
                return False
            there = [e for e in self._entries.values() if e.in_memory]
            excess = self.num_bytes + entry.num_bytes - self._max_bytes
            victims = retention.victims_of(entry, there, excess, self.version)
            self.num_dropped += 1 if victims is None else len(victims)
            if victims is None:
                return False
            for victim in victims:
                self._drop(victim)
            # Room is taken before the copy is made, so that the bound holds always.
            self._entries[entry.text_id] = entry
            entry.pins, entry.in_memory = 1, True
            self.num_bytes += entry.num_bytes
        try:
            entry.record = text_arrays.kept(record, self._dtype)
        finally:
            with self._changed:
                if entry.record is None:
                    self._drop(entry)
                self._unpin(entry)
                self._notify()
        return True

    def view(self) -> View:
        """List the texts that are there now."""
        with self._changed:
            return View(self, self._ready())

    def wait(self, timeout_s: float) -> None:
        """Wait for a change, such as a new text, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def flush(self) -> None:
        """Wait until what is to go to disk is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)

    def close(self) -> None:
        """End the writing thread and remove what is on disk."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._spill.clear()

    def read(self, entry: retention.Entry) -> layout.Record:
        """Read a text of a view; see `View.read`."""
        with self._changed:
            record = entry.record
            if record is not None:
                return record
            if not entry.on_disk:
                raise TextGoneError(f"text {entry.text_id} was dropped.")
        try:
            data = self._spill.read(entry.serial, entry.num_bytes)
        except spill_lib.SpillError as error:
            with self._changed:
                there = not entry.dropped
                self._drop(entry)
            if there:
                self._report(error)
            raise TextGoneError(f"text {entry.text_id}: {error}") from error
        return layout.Record(
            text_id=entry.text_id,
            response_start=entry.response_start,
            version=entry.version,
            **text_arrays.from_bytes(data, entry.length, self._widths, self._dtype),
        )

    @contextlib.contextmanager
    def holding(self, entries: Sequence[retention.Entry]) -> Iterator[int]:
        """Keep texts of a view; gives how many of them are still there."""
        with self._changed:
            there = [e for e in entries if not e.dropped]
            for entry in there:
                entry.pins += 1
        try:
            yield len(there)
        finally:
            with self._changed:
                for entry in there:
                    self._unpin(entry)
                self._notify()

    def state(self) -> dict[str, np.ndarray]:
        """Copy everything into arrays, for a checkpoint.

        They are `arrays.pack`'s, with `version` `[]` and `on_disk` `[num_texts]`, and
        take as many bytes as the texts in memory and on disk together.
        """
        with self._changed:
            entries = sorted(self._ready(), key=lambda e: e.text_id)
            version = self.version
        records, on_disk = [], []
        with self.holding(entries):
            for entry in entries:
                with contextlib.suppress(TextGoneError):
                    records.append(self.read(entry))
                    on_disk.append(not entry.in_memory)
            packed = text_arrays.pack(records, self._widths or (0, 0), self._dtype)
        return packed | {
            "version": np.array(version, np.int64),
            "on_disk": np.array(on_disk, bool),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take `state`'s texts, each to where it was: all if the bounds are the same.

        Raises:
          ValueError: the buffer is not empty, or the dtype is another one.
        """
        if self._entries:
            raise ValueError("restore needs an empty buffer: make a new one.")
        records = text_arrays.unpack(state, self._dtype.name)
        on_disk = np.asarray(state["on_disk"])
        self.begin_step(int(state["version"]))
        # Nothing is moved before everything is there.
        works, self._disk_works = self._disk_works, False
        moved = sorted(zip(records, on_disk, strict=True), key=lambda pair: not pair[1])
        for record, was_on_disk in moved:
            if not (was_on_disk and works and self._append_to_disk(record)):
                self.append(record)
        with self._changed:
            self._disk_works = works and self.spill_error is None
            self.num_appended = 0
            self._notify()

    def _new_entry(self, record: layout.Record) -> retention.Entry:
        layout.check(record, self._entries)
        widths = text_arrays.widths(record)
        if self._widths is None:
            self._widths = widths
        if widths != self._widths:
            raise ValueError(
                f"text {record.text_id} has hidden and features of widths {widths}, "
                f"others {self._widths}: one target wrote all texts of a buffer."
            )
        self._serial += 1
        return retention.Entry(
            text_id=record.text_id,
            version=record.version,
            length=len(record.tokens),
            response_start=record.response_start,
            num_bytes=text_arrays.num_bytes(record, self._dtype),
            serial=self._serial,
        )

    def _ready(self) -> list[retention.Entry]:
        entries = self._entries.values()
        return [e for e in entries if e.record is not None or e.on_disk]

    def _drop(self, entry: retention.Entry) -> None:
        if not entry.dropped:
            entry.dropped = True
            self._entries.pop(entry.text_id, None)
            if not entry.pins:
                self._discard(entry)

    def _discard(self, entry: retention.Entry) -> None:
        self._free(entry)
        if entry.on_disk:
            entry.on_disk = False
            self._trash.append(entry)

    def _free(self, entry: retention.Entry) -> None:
        """Give its memory up."""
        entry.record = None
        if entry.in_memory:
            entry.in_memory = False
            self.num_bytes -= entry.num_bytes

    def _unpin(self, entry: retention.Entry) -> None:
        entry.pins -= 1
        if entry.pins == 0:
            if entry.dropped:
                self._discard(entry)
            elif entry.on_disk:
                self._free(entry)

    def _notify(self) -> None:
        self._idle = self._thread is None
        self._changed.notify_all()

    def _report(self, error: spill_lib.SpillError) -> None:
        with self._changed:
            first = self.spill_error is None
            self.spill_error = self.spill_error or error
        if first and self._on_spill_error is not None:
            self._on_spill_error(error)

    def _write_behind(self) -> None:
        """Move texts to disk and remove them there: a thread's whole life."""
        while True:
            with self._changed:
                while True:
                    entry = self._next_to_write()
                    if self._closed or entry is not None or self._trash:
                        break
                    if not self._idle:
                        self._idle = True
                        self._changed.notify_all()
                    self._changed.wait()
                if self._closed:
                    return
                trash, self._trash = self._trash, []
            for gone in trash:
                self._delete(gone)
            if entry is not None:
                self._write(entry)

    def _next_to_write(self) -> retention.Entry | None:
        """Choose a text for the disk and count it there; may drop others for it."""
        full = self.num_bytes > _SPILL_ABOVE * self._max_bytes
        if not (full and self._disk_works) or self._trash:
            return None
        in_memory = [e for e in self._entries.values() if e.in_memory]
        idle = [e for e in in_memory if not e.pins]
        if not idle:
            return None
        chosen = retention.least_useful(idle, in_memory, self.version)
        on_disk = [e for e in self._entries.values() if e.on_disk]
        excess = self.num_disk_bytes + chosen.num_bytes - self._max_disk_bytes
        victims = retention.victims_of(chosen, on_disk, excess, self.version)
        if victims is None:
            return None
        self.num_dropped += len(victims)
        for victim in victims:
            self._drop(victim)
        if victims:
            return None  # They are removed first.
        self.num_disk_bytes += chosen.num_bytes
        chosen.pins += 1
        return chosen

    def _write(self, entry: retention.Entry) -> None:
        """Write a pinned text that is counted on disk already."""
        error = None
        try:
            self._spill.write(entry.serial, text_arrays.arrays(entry.record))
        except spill_lib.SpillError as failure:
            error = failure
        with self._changed:
            if error is None:
                entry.on_disk = True
                self.num_spilled += 1
            else:
                self.num_disk_bytes -= entry.num_bytes
                self._disk_works = False
            self._unpin(entry)
            self._notify()
        if error is not None:
            self._report(error)

    def _delete(self, entry: retention.Entry) -> None:
        try:
            self._spill.delete(entry.serial)
        except spill_lib.SpillError as error:
            # Its bytes still count: they are still there.
            self._disk_works = False
            self._report(error)
        else:
            with self._changed:
                self.num_disk_bytes -= entry.num_bytes

    def _append_to_disk(self, record: layout.Record) -> bool:
        """Write a text to disk in this thread; say whether it is there."""
        with self._changed:
            entry = self._new_entry(record)
            excess = self.num_disk_bytes + entry.num_bytes - self._max_disk_bytes
            if excess > 0 or self.spill_error is not None:
                return False
            self.num_disk_bytes += entry.num_bytes
            entry.pins = 1
        entry.record = text_arrays.kept(record, self._dtype)
        self._write(entry)
        if entry.on_disk:
            with self._changed:
                self._entries[entry.text_id] = entry
        return entry.on_disk
