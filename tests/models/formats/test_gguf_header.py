"""Heads of GGUF files whose sizes do not hold together, written byte by byte."""

import struct
import sys

import pytest

from tlt_jax.models.formats import gguf_file, gguf_header

U32, STRING, ARRAY, U8 = 4, 8, 9, 0
F32, Q8_0 = 0, 8


def text(value):
    return struct.pack("<Q", len(value)) + value


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, dims, offset, kind=F32):
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


def file_of(fields=(), tensors=(), size=64, version=3, num_fields=None):
    counts = len(tensors), len(fields) if num_fields is None else num_fields
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + size)


def check(path, content):
    path.write_bytes(content)
    gguf_header.check(path)


def test_what_fits_is_accepted(tmp_path):
    fields = (
        field(b"a", U32, b"\1\0\0\0"),
        field(b"b", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"x") + text(b"")),
        field(b"general.alignment", U32, struct.pack("<I", 32)),
    )
    tensors = (tensor(b"x", (2, 3), 32), tensor(b"y", (8,), 0))
    check(tmp_path / "x", file_of(fields, tensors))
    check(tmp_path / "x", file_of((), (tensor(b"x", (32,), 0, Q8_0),), 34))


@pytest.mark.parametrize(
    "content,message",
    [
        (file_of(version=1), "version 1"),
        (file_of(num_fields=2**60), "entries in the last"),
        # Each would keep the package's reader busy for ever.
        (file_of([field(b"a", ARRAY, struct.pack("<IQ", U8, 2**60))]), "entries in"),
        (file_of([field(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "lists of lists"),
        (file_of([field(b"a", 77, b"")]), "unknown type 77"),
        (file_of([field(b"a", U32, bytes(4))] * 2), "key 'a' stands there twice"),
        (file_of([field(b"\xff", U32, bytes(4))]), "not UTF-8"),
        (file_of((), [tensor(b"x", (8,), 0)] * 2), "'x' stands there twice"),
        (
            file_of((), [tensor(b"x", (9,), 0), tensor(b"y", (8,), 32)]),
            "'y' overlaps 'x'",
        ),
        (file_of((), [tensor(b"x", (8,), 4)]), "overlaps"),
        (file_of((), [tensor(b"x", (8,), 64)]), "32 bytes are missing"),
        (file_of((), [tensor(b"x", (2**40, 2**40), 0)]), "bytes are missing"),
        (file_of((), [tensor(b"x", (0,), 0)]), "has the shape"),
        (file_of((), [tensor(b"x", (31,), 0, Q8_0)]), "has the shape"),
        (file_of((), [tensor(b"x", (1,) * 5, 0)]), "5 dimensions"),
        (file_of((), [tensor(b"x", (8,), 0, 999)]), "unknown type 999"),
        (
            file_of([field(b"general.alignment", U32, struct.pack("<I", 24))]),
            "alignment 24",
        ),
    ],
)
def test_what_does_not_fit_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(tmp_path / "x", content)


def test_a_machine_without_the_package_says_so_where_a_file_is_read(
    tmp_path, monkeypatch
):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="not installed here: pip install gguf, or"):
        gguf_file.GGUFFile(path)
