"""Checksums of what a folder's subfolders hold, to see whether it is still so.

They are CRC-32, which sees every flipped bit, several GB/s, and the files' sizes.
"""

import concurrent.futures
import json
import pathlib
import zlib
from collections.abc import Collection

from tlt_jax.workdir import files

FILE = "checksums.json"
_NUM_THREADS = 4
_BLOCK_BYTES = 1 << 22


def write(folder: pathlib.Path) -> None:
    """Write the sizes and checksums of all files in a folder's subfolders into it.

    Raises:
      files.WorkdirError: they cannot be written.
    """
    paths = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        sums = list(pool.map(_of, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    with files.replacing(folder / FILE) as file:
        json.dump(dict(zip(names, sums, strict=True)), file, indent=0)


def damaged(folder: pathlib.Path, parts: Collection[str] = ()) -> str:
    """Say which file is not what it was when `write` was called; empty: none.

    Read are those of the subfolders named; no names: of all.
    """
    try:
        told = json.loads((folder / FILE).read_bytes())
        wanted = {name: (int(size), int(crc)) for name, (size, crc) in told.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return FILE
    if parts:
        wanted = {n: s for n, s in wanted.items() if n.split("/")[0] in parts}
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = pool.map(_of, [folder / name for name in wanted])
        for (name, told), there in zip(wanted.items(), found, strict=True):
            if told != there:
                return name
    return ""


def _of(path: pathlib.Path) -> tuple[int, int] | None:
    """Return a file's size and checksum; None: it cannot be read."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError:
        return None
    return size, crc
