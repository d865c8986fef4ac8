"""Rows of a data set, wherever it lies: in a file, in a directory, on the hub.

Directories that the library `datasets` saved are read by pyarrow, which Parquet needs
anyway: they are Arrow streams with a list of their files beside them.
"""

import contextlib
import csv
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tlt_jax.models.formats import json_file

SUFFIXES = (".jsonl", ".csv", ".parquet")
HUB = "hub:"
ACCEPTED = (
    "a .jsonl file (one JSON object a line), a .csv file (with a header) or a .parquet "
    "file, a directory of such or one that datasets' save_to_disk wrote, or "
    "hub:ORGANISATION/NAME"
)
# Where the hub keeps every data set as Parquet, SUBSET/SPLIT/NUMBER.parquet.
_PARQUET_REVISION = "refs/convert/parquet"
_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_DEFAULT_SPLIT = "train"
_BATCH_ROWS = 1024
# What Arrow and its conversion to Python raise of damaged files besides its own.
_DAMAGED = (ValueError, ArithmeticError, LookupError, TypeError, MemoryError)


def is_data(name: str) -> bool:
    """Tell whether `name` names a data set, and not a task."""
    if name.startswith(HUB) or name.endswith(SUFFIXES):
        return True
    directory = pathlib.Path(name).expanduser()
    if not directory.is_dir():
        return False
    marks = (_SPLITS_FILE, _STATE_FILE)
    return any((directory / mark).exists() for mark in marks) or bool(_loose(directory))


def find(
    name: str | os.PathLike, split: str | None = None, subset: str | None = None
) -> list[pathlib.Path]:
    """Find the files of a data set, fetching them if they are on the hub.

    Args:
      name: see `ACCEPTED`.
      split: of a set that has several; None: `train`, or the only one.
      subset: of a set on the hub that has several; None: `default`, or the only one.

    Returns:
      The files in order, of one split.

    Raises:
      ValueError: the name is of no known kind, there is no such file or split, it is
        damaged, or it cannot be fetched.
    """
    text = os.fspath(name)
    if text.startswith(HUB):
        return _from_hub(text.removeprefix(HUB), split, subset)
    path = pathlib.Path(text).expanduser()
    if subset is not None:
        raise ValueError(f"subset={subset!r} is for sets on the hub; {name} is here.")
    if path.is_dir():
        return _from_directory(path, split)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name} has the suffix {path.suffix!r}: give {ACCEPTED}.")
    if not path.is_file():
        raise ValueError(
            f"{name} is not a file (current directory: {pathlib.Path.cwd()})."
        )
    if split is not None:
        raise ValueError(
            f"split={split!r} is for sets with several; {name} is one file: leave it "
            "out, or name the file of that split."
        )
    return [path]


def unit(path: pathlib.Path) -> str:
    """Name what a file's rows are for people."""
    return "row" if path.suffix not in (".jsonl", ".csv") else "line"


def rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Read a file's rows with their numbers, from 1 on.

    Of JSONL the lines as bytes, blank ones left out; of the others dicts. A row of
    CSV has the number of its last line; its empty cells are None.

    Raises:
      ValueError: it is damaged, or cannot be read.
    """
    readers = {".jsonl": _lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix, _arrow_rows)
    try:
        yield from reader(path)
    except OSError as error:  # Of the system, or of Arrow, for what is damaged inside.
        reason = error.strerror or str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read ({reason}): restore the file, or give permission "
            "to read it."
        ) from error


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # What is not UTF-8 becomes halves of characters, which no row of examples may hold.
    text = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with path.open(**text) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:  # cells beyond the header
                    raise ValueError(
                        f"{path}, line {reader.line_num} has more cells than the header"
                        ": put text that holds commas into quotes."
                    )
                yield reader.line_num, {k: v or None for k, v in row.items()}
        except csv.Error as error:
            line = reader.reader.line_num
            raise ValueError(
                f"{path}, line {line}: {error}: is a quotation mark missing?"
            ) from error


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    # Here, because reward workers and JSONL users do without it.
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=_BATCH_ROWS))
    except (pyarrow.ArrowException, *_DAMAGED) as error:
        raise ValueError(
            f"{path} is not a Parquet file, or damaged: {_line(error)}."
        ) from error


def _arrow_rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as data:
            with pyarrow.ipc.open_stream(data) as batches:
                yield from _numbered(batches, 8 * data.size())
    except (pyarrow.ArrowException, *_DAMAGED) as error:
        raise ValueError(
            f"{path} is not an Arrow stream ({_line(error)}): save the data set again."
        ) from error


def _numbered(batches, most: int | None = None) -> Iterator[tuple[int, Any]]:
    """Count rows of batches that are whole, of which a file can have `most`."""
    number = 0
    for batch in batches:
        # What a file says of lengths and places is believed from here on.
        batch.validate(full=True)
        if most is not None and batch.num_rows > most:
            raise ValueError(f"it says to have {batch.num_rows} rows")
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _line(error: Exception) -> str:
    """Say an error of Arrow in one line, and not a long one."""
    return " ".join(str(error).split())[:200].rstrip(".")


def _from_directory(directory: pathlib.Path, split: str | None) -> list[pathlib.Path]:
    if (directory / _SPLITS_FILE).exists():
        there = _json(directory / _SPLITS_FILE).get("splits") or []
        if not isinstance(there, list) or not all(map(_is_plain, there)):
            raise ValueError(
                f"{directory / _SPLITS_FILE} lists {json_file.show(there)}, which are "
                "no directories beside it: save the data set again."
            )
        chosen = _choose("split", split, there, _DEFAULT_SPLIT, directory)
        return _saved(directory / chosen)
    if (directory / _STATE_FILE).exists():
        if split is not None:
            raise ValueError(
                f"split={split!r}: {directory} holds one split alone; leave it out."
            )
        return _saved(directory)
    files = _loose(directory)
    if not files:
        raise ValueError(f"{directory} holds no data: give {ACCEPTED}.")
    if len({path.suffix for path in files}) > 1:
        raise ValueError(
            f"{directory} holds "
            f"{' and '.join(sorted({path.suffix for path in files}))} files: name one "
            "of them, or keep one kind there."
        )
    # As on the hub: SPLIT.parquet, or SPLIT-00000-of-00002.parquet.
    there = list(dict.fromkeys(path.stem.split("-")[0] for path in files))
    if split is None and _DEFAULT_SPLIT not in there and len(there) > 1:
        return files
    chosen = _choose("split", split, there, _DEFAULT_SPLIT, directory)
    return [path for path in files if path.stem.split("-")[0] == chosen]


def _loose(directory: pathlib.Path) -> list[pathlib.Path]:
    """Data files of a directory, and of `data` below it."""
    folders = (directory, directory / "data")
    found = (path for folder in folders for path in sorted(folder.glob("*")))
    return [path for path in found if path.suffix in SUFFIXES and path.is_file()]


def _saved(directory: pathlib.Path) -> list[pathlib.Path]:
    """Files of what `save_to_disk` wrote."""
    state = _json(directory / _STATE_FILE)
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{directory} was saved with an index of its rows, by an old version of "
            "datasets: save it again after flatten_indices()."
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / _STATE_FILE} lists no files: save the data set again."
        ) from error
    outside = [name for name in names if not _is_plain(name)]
    if outside:
        raise ValueError(
            f"{directory / _STATE_FILE} names {json_file.show(outside[0])}, which is "
            "no file beside it: refused."
        )
    files = [directory / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {missing[0]}: save the data set again.")
    return files


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json_file.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): save the data set again."
        ) from error
    return value if isinstance(value, dict) else {}


def _is_plain(name: object) -> bool:
    """Whether it names something in a directory, and nothing outside of it."""
    return isinstance(name, str) and bool(re.fullmatch(r"(?!\.+$)[\w.+=@ -]+", name))


def _choose(
    what: str, asked: str | None, there: Sequence[str], default: str, where: object
) -> str:
    if asked is None:
        asked = there[0] if len(there) == 1 else default
    if asked not in there:
        raise ValueError(
            f"{where} has no {what} {asked!r}: it has {', '.join(there) or 'none'}; "
            f"name one with {what}."
        )
    return asked


def _from_hub(name: str, split: str | None, subset: str | None) -> list[pathlib.Path]:
    # Here, because files need none of it.
    import huggingface_hub

    where = {"repo_id": name, "repo_type": "dataset", "revision": _PARQUET_REVISION}
    with _fetching(name):
        there = huggingface_hub.HfApi().list_repo_files(**where)
    chosen = on_hub(name, there, split, subset)
    with _fetching(name):
        files = [huggingface_hub.hf_hub_download(filename=x, **where) for x in chosen]
    return [pathlib.Path(file) for file in files]


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Turn whatever keeps a data set away into one error that says what to do."""
    try:
        yield
    except Exception as error:  # of the hub, of its HTTP client, or of the disk
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{HUB}{name} could not be fetched from the hub "
            f"({reason[0] if reason else type(error).__name__}). Where it cannot be "
            "reached, copy the set's .parquet files here and name their directory."
        ) from error


def on_hub(
    name: str, there: Sequence[str], split: str | None, subset: str | None
) -> list[str]:
    """Choose the files of a split among those of the hub's Parquet branch.

    Raises:
      ValueError: there is no such subset or split; the message names what there is.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    for path in sorted(there):
        folders = path.split("/")
        if len(folders) == 3 and path.endswith(".parquet"):
            parts.setdefault(folders[0], {}).setdefault(folders[1], []).append(path)
    chosen = parts[_choose("subset", subset, list(parts), "default", name)]
    return chosen[_choose("split", split, list(chosen), _DEFAULT_SPLIT, name)]
