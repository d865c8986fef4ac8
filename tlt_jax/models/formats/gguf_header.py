"""A strict look at the head of a GGUF file, before a reader believes its sizes.

The `gguf` package takes a file's counts at their word: one that is damaged can keep it
busy for ever, or have two tensors share bytes.
"""

import math
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import gguf

_VERSIONS = (2, 3)
_SCALARS = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
    gguf.GGUFValueType.BOOL: "?",
}
_SIZES = {kind: struct.calcsize(f"<{form}") for kind, form in _SCALARS.items()}
_MOST_DIMS, _MOST_NAME = 4, 2**16


def check(path: str | os.PathLike) -> None:
    """Refuse a file whose sizes do not hold together.

    Reads the head once, forwards, and no more than the file has.

    Raises:
      ValueError: saying what is wrong, without the path.
    """
    with open(path, "rb") as file:
        _Head(file).check()


class _Head:
    """A cursor that never leaves the file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def check(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_fields = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(
                f"version {version}; accepted: 2 or 3, little-endian numbers"
            )
        alignment, keys = gguf.GGUF_DEFAULT_ALIGNMENT, set()
        for _ in range(self._count(num_fields, 12)):
            key = self._string("a key", _MOST_NAME)
            if key in keys:
                raise ValueError(f"the key {key[:60]!r} stands there twice")
            keys.add(key)
            value = self._value(self._kind())
            if key == "general.alignment":
                alignment = value
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r} is no power of two")
        tensors = list(self._tensors(num_tensors))
        start = -(-self._file.tell() // alignment) * alignment
        end, before = start, ""
        for offset, num_bytes, name in sorted(tensors):
            if offset % alignment or start + offset < end:
                raise ValueError(f"the tensor {name[:60]!r} overlaps {before[:60]!r}")
            end, before = start + offset + num_bytes, name
        if tensors and end > self._size:
            raise ValueError(f"{end - self._size} bytes are missing at its end")

    def _tensors(self, count: int) -> Iterator[tuple[int, int, str]]:
        """Offset, size in bytes and name of every tensor."""
        names = set()
        for _ in range(self._count(count, 24)):
            name = self._string("a tensor's name", _MOST_NAME)
            if name in names:
                raise ValueError(f"the tensor {name[:60]!r} stands there twice")
            names.add(name)
            (num_dims,) = self._numbers("I")
            if not 1 <= num_dims <= _MOST_DIMS:
                raise ValueError(f"the tensor {name[:60]!r} has {num_dims} dimensions")
            dims = self._numbers("Q" * num_dims)
            kind, offset = self._numbers("IQ")
            try:
                block, block_bytes = gguf.GGML_QUANT_SIZES[
                    gguf.GGMLQuantizationType(kind)
                ]
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"the tensor {name[:60]!r} has the unknown type {kind}"
                ) from error
            num = math.prod(dims)
            if not num or dims[0] % block:
                raise ValueError(f"the tensor {name[:60]!r} has the shape {dims}")
            yield offset, num // block * block_bytes, name

    def _kind(self) -> gguf.GGUFValueType:
        (number,) = self._numbers("I")
        try:
            return gguf.GGUFValueType(number)
        except ValueError as error:
            raise ValueError(f"a value has the unknown type {number}") from error

    def _value(self, kind: gguf.GGUFValueType):
        """Pass over a value; return it if it is a number."""
        if kind == gguf.GGUFValueType.STRING:
            return self._string("a text")
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        inner = self._kind()
        (count,) = self._numbers("Q")
        if inner == gguf.GGUFValueType.ARRAY:
            raise ValueError("it has lists of lists, which no model needs")
        if inner == gguf.GGUFValueType.STRING:
            for _ in range(self._count(count, 8)):
                self._string("a text")
            return None
        self._skip(self._count(count, _SIZES[inner]) * _SIZES[inner])
        return None

    def _string(self, what: str, most: int | None = None) -> str:
        (length,) = self._numbers("Q")
        if most is not None and length > most:
            raise ValueError(f"{what} of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8") from error

    def _count(self, count: int, least_bytes: int) -> int:
        """Return a number of entries that can be there."""
        left = self._size - self._file.tell()
        if count * least_bytes > left:
            raise ValueError(f"{count} entries in the last {left} bytes")
        return count

    def _numbers(self, form: str) -> tuple:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, length: int) -> bytes:
        self._count(length, 1)
        return self._file.read(length)

    def _skip(self, length: int) -> None:
        self._file.seek(length, os.SEEK_CUR)
