"""Files that others read while they are written: there as a whole, or as they were."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import TextIO

from tlt_jax.runtime import failures

# Of what is written aside, beside where it shall be: `.NAME.partial`, or with letters
# of its own in between where several processes may write.
_ASIDE = ".*.partial"


class WorkdirError(failures.UserError):
    """The directory cannot be used."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Say what to do where a file cannot be written.

    Raises:
      WorkdirError: in place of an `OSError`.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise WorkdirError(
            f"{path} could not be written ({error.strerror}): a file stands where a "
            "directory is needed; name another --workdir."
        ) from error
    except OSError as error:
        raise WorkdirError(
            f"{path} could not be written ({error.strerror or error}): make room or "
            "give permission, then run the same command again; it resumes from the "
            "newest checkpoint."
        ) from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[TextIO]:
    """Give a text file that takes the place of `path` when it is complete, on disk.

    Raises:
      WorkdirError: it cannot be written; what was there is left as it was.
    """
    aside = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with open(aside, "w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a folder whose files take their places in `folder` once all are complete.

    Raises:
      WorkdirError: they cannot be written; what was there is left as it was.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        try:
            aside.mkdir()
            yield aside
            folder.mkdir(exist_ok=True)
            for file in aside.iterdir():
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def append_line(path: pathlib.Path, line: str) -> None:
    """Append a line in one write, behind whole lines alone.

    Half a line, which a killed process has left, is cut off.

    Raises:
      WorkdirError: it cannot be written; none of it was.
    """
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            end = _end_of_lines(file)
            os.ftruncate(file, end)
            data = f"{line}\n".encode()
            try:
                written = os.pwrite(file, data, end)
                if written < len(data):
                    raise OSError("no space left")
            except OSError:
                os.ftruncate(file, end)
                raise
        finally:
            os.close(file)


def _end_of_lines(file: int) -> int:
    """Return where the last whole line of an open file ends."""
    end, block = os.fstat(file).st_size, 1 << 16
    while end:
        start = max(end - block, 0)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def remove_remains(directory: pathlib.Path) -> None:
    """Remove what processes that were killed have left half written in a directory.

    The caller is the only one that writes there.
    """
    for folder in (directory, directory / "rollouts"):
        for path in folder.glob(_ASIDE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
