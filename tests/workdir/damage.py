"""Damage to a directory's files: one bit, a cut, a removal."""

import pathlib
from collections.abc import Iterator

import numpy as np


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Files below a directory that hold anything, in a fixed order."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return [path for path in found if path.stat().st_size]


def flips(
    directory: pathlib.Path, num_per_file: int, seed: int
) -> Iterator[tuple[pathlib.Path, int]]:
    """Flip one bit at a time in every file; the caller finds it so, then it is mended.

    Yields the file and the bit's number.
    """
    rng = np.random.default_rng(seed)
    for path in files(directory):
        whole = path.read_bytes()
        for bit in rng.integers(8 * len(whole), size=num_per_file).tolist():
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            yield path, bit
            path.write_bytes(whole)


def losses(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """Cut and remove one file after the other, as `flips` does."""
    for path in files(directory):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        yield path, "cut"
        path.unlink()
        yield path, "removed"
        path.write_bytes(whole)
