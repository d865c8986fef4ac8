"""Texts with features as a few plain arrays, bit for bit, and back."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tlt_jax.specdec.texts import layout

DTYPES = ("float32", "bfloat16")
_NAMES = ("tokens", "hidden", "features", "key")


def dtype_of(name: str) -> np.dtype:
    """Return the dtype that features are kept in.

    Raises:
      ValueError: `name` is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: use {' or '.join(DTYPES)}.")
    return np.dtype(jnp.dtype(name))


def bits_of(dtype: np.dtype) -> np.dtype:
    """Return what files hold features as: of bfloat16, which few know, the bits."""
    return np.dtype(np.uint16) if dtype.itemsize == 2 else dtype


def kept(record: layout.Record, dtype: np.dtype) -> layout.Record:
    """Copy a record's arrays, features in `dtype`."""
    features = record.features
    return dataclasses.replace(
        record,
        tokens=np.array(record.tokens, np.int32, order="C"),
        hidden=np.array(record.hidden, dtype, order="C"),
        features=None if features is None else np.array(features, dtype, order="C"),
        key=np.array(record.key, np.uint32, order="C"),
    )


def num_bytes(record: layout.Record, dtype: np.dtype) -> int:
    """Count the bytes of what `kept` returns."""
    values = sum(widths(record)) * len(record.tokens)
    return values * dtype.itemsize + 4 * len(record.tokens) + 8


def widths(record: layout.Record) -> tuple[int, int]:
    """Return the width of `hidden` and of `features`, 0 for none."""
    features = record.features
    return record.hidden.shape[1], 0 if features is None else features.shape[1]


def arrays(record: layout.Record) -> list[np.ndarray]:
    """List a record's arrays, for writing them end to end."""
    listed = [getattr(record, name) for name in _NAMES]
    return [array for array in listed if array is not None]


def from_bytes(
    data: memoryview, length: int, shape: tuple[int, int], dtype: np.dtype
) -> dict[str, np.ndarray | None]:
    """Take apart what `arrays` lists, written end to end: a record's arrays by name.

    They are views of `data`, of `length` tokens; `shape` is `widths` of the record.
    """
    hidden, features = shape
    wanted = {
        "tokens": ((length,), np.dtype(np.int32)),
        "hidden": ((length, hidden), dtype),
        "features": ((length, features), dtype),
        "key": ((2,), np.dtype(np.uint32)),
    }
    found, first = {"features": None}, 0
    if not features:
        del wanted["features"]
    for name, (size, kind) in wanted.items():
        last = first + int(np.prod(size)) * kind.itemsize
        # Through bytes, since bfloat16 is no dtype of the buffer protocol.
        part = np.frombuffer(data[first:last], np.uint8)
        found[name], first = part.view(kind).reshape(size), last
    return found


def pack(
    records: Sequence[layout.Record], shape: tuple[int, int], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Join records into arrays that any file format can hold.

    Args:
      records: as `kept` returns them.
      shape: `widths` of all of them.
      dtype: of the features.

    Returns:
      `texts` `[num_texts, 4] int64`: id, version, length, where the response starts;
      `keys` `[num_texts, 2] uint32`; `tokens`, `hidden` and `features` of all texts end
      to end, bfloat16 as its bits (uint16), no features as width 0.
    """
    hidden, features = shape

    def joined(name, width):
        parts = [np.zeros((0, width), dtype)]
        parts += [getattr(r, name) for r in records if width]
        return np.concatenate(parts).view(bits_of(dtype))

    rows = [(r.text_id, r.version, len(r.tokens), r.response_start) for r in records]
    tokens = [np.zeros(0, np.int32), *(r.tokens for r in records)]
    return {
        "texts": np.array(rows, np.int64).reshape(-1, 4),
        "keys": np.array([r.key for r in records], np.uint32).reshape(-1, 2),
        "tokens": np.concatenate(tokens),
        "hidden": joined("hidden", hidden),
        "features": joined("features", features),
    }


def unpack(packed: dict[str, np.ndarray], dtype: str) -> list[layout.Record]:
    """Take `pack`'s arrays, also as JAX arrays, apart; the records are views of them.

    Raises:
      ValueError: the features are of another dtype.
    """
    packed = {name: np.asarray(array) for name, array in packed.items()}
    wanted = np.dtype(jnp.dtype(dtype))
    if packed["hidden"].dtype.itemsize != wanted.itemsize:
        raise ValueError(
            f"dtype={dtype!r}: the texts were kept in another one; name that, or begin "
            "without them."
        )
    hidden, features = packed["hidden"].view(wanted), packed["features"].view(wanted)
    records, first = [], 0
    for row, (text_id, version, length, start) in enumerate(packed["texts"].tolist()):
        here = slice(first, first + length)
        records.append(
            layout.Record(
                text_id=text_id,
                tokens=packed["tokens"][here],
                response_start=start,
                hidden=hidden[here],
                features=features[here] if features.shape[1] else None,
                key=packed["keys"][row],
                version=version,
            )
        )
        first += length
    return records
