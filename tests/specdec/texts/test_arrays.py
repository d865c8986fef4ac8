"""Records as plain arrays: what is counted, written and read is the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec.texts import test_buffer
from tlt_jax.specdec.texts import arrays as text_arrays

made, assert_same = test_buffer.made, test_buffer.assert_same
DTYPES = [np.dtype(np.float32), np.dtype(jnp.bfloat16)]


def test_what_is_counted_is_what_is_kept():
    for dtype in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
        for record in (made(1), made(2, features=False)):
            arrays = text_arrays.arrays(text_arrays.kept(record, dtype))
            total = sum(array.nbytes for array in arrays)
            assert text_arrays.num_bytes(record, dtype) == total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [True, False])
def test_bytes_come_back(dtype, features):
    kept = text_arrays.kept(made(3, 9, 2, 4, features=features), dtype)
    data = b"".join(array.tobytes() for array in text_arrays.arrays(kept))
    again = text_arrays.from_bytes(memoryview(data), 9, text_arrays.widths(kept), dtype)
    assert set(again) == {"tokens", "hidden", "features", "key"}
    assert_same(dataclasses.replace(kept, **again), kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [True, False])
def test_packed_texts_come_back(dtype, features):
    records = [
        text_arrays.kept(made(i, 4 + i, 12 - i, 1 + i % 2, features=features), dtype)
        for i in (5, 2, 9)
    ]
    packed = text_arrays.pack(records, text_arrays.widths(records[0]), dtype)
    np.testing.assert_array_equal(
        packed["texts"], [[5, 7, 9, 2], [2, 10, 6, 1], [9, 3, 13, 2]]
    )
    assert packed["hidden"].shape == (28, 3)
    assert packed["features"].shape == ((28, 6) if features else (0, 0))
    # Any file format can hold them: bfloat16 goes as its bits.
    assert packed["hidden"].dtype == (np.uint16 if dtype.itemsize == 2 else np.float32)
    again = text_arrays.unpack(packed, dtype.name)
    for got, wanted in zip(again, records, strict=True):
        assert_same(got, wanted)
    with pytest.raises(ValueError, match="the texts were kept in another one"):
        text_arrays.unpack(packed, "float32" if dtype.itemsize == 2 else "bfloat16")


def test_no_texts_are_empty_arrays():
    packed = text_arrays.pack([], (3, 6), DTYPES[0])
    assert {name: x.shape for name, x in packed.items()} == {
        "texts": (0, 4),
        "keys": (0, 2),
        "tokens": (0,),
        "hidden": (0, 3),
        "features": (0, 6),
    }
    assert text_arrays.unpack(packed, "float32") == []
