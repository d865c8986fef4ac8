"""Texts on disk: shards that appear whole."""

import numpy as np
import pytest

from tlt_jax.specdec.texts import layout, shards


def made(text_id, length, start, width=3):
    rng = np.random.default_rng(text_id)
    return layout.Record(
        text_id=text_id,
        tokens=rng.integers(50, size=length).astype(np.int32),
        response_start=start,
        hidden=rng.normal(size=(length, width)).astype(np.float32),
        features=rng.normal(size=(length, 2 * width)).astype(np.float32),
        key=np.array([text_id, 1], np.uint32),
        version=4,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_come_back_in_the_order_of_their_ids(tmp_path, dtype):
    records = {i: made(i, 4 + i, 2) for i in (5, 1, 3)}
    buffer = shards.Shards(tmp_path, dtype)
    buffer.append([records[5], records[1]])
    # A writer that was killed leaves this.
    (tmp_path / "shard_000001.partial").mkdir()
    buffer = shards.Shards(tmp_path, dtype)
    buffer.append([records[3]])
    again = shards.Shards(tmp_path, dtype)
    assert buffer.text_ids == again.text_ids == [1, 3, 5]
    for index, text_id in enumerate((1, 3, 5)):
        got, wanted = again.read(index), records[text_id]
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.key, wanted.key)
        assert (got.response_start, got.version) == (2, 4)
        tolerance = 0 if dtype == "float32" else 2.0**-8
        for name in ("hidden", "features"):
            np.testing.assert_allclose(
                getattr(got, name).astype(np.float32),
                getattr(wanted, name),
                rtol=tolerance,
            )


def test_shards_are_dropped_whole(tmp_path):
    """Where a text of theirs is still wanted, they stay; names are not given twice."""
    buffer = shards.Shards(tmp_path, "float32")
    for ids in ((0, 1), (2, 9), (3, 4)):
        buffer.append([made(i, 5, 2) for i in ids])
    buffer.drop(range(5))
    assert buffer.text_ids == [2, 9]
    buffer.append([made(5, 5, 2)])
    for each in (buffer, shards.Shards(tmp_path, "float32")):
        assert each.text_ids == [2, 5, 9]
        np.testing.assert_array_equal(each.read(1).tokens, made(5, 5, 2).tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("shard_000001", "shard_000003"),
    ]


def test_bad_records_are_refused(tmp_path):
    buffer = shards.Shards(tmp_path, "float32")
    buffer.append([made(1, 4, 2)])
    with pytest.raises(ValueError, match="text_id=1 is in the buffer already"):
        buffer.append([made(1, 4, 2)])
    with pytest.raises(ValueError, match="response_start=0 in 4 tokens"):
        buffer.append([made(2, 4, 0)])
    with pytest.raises(ValueError, match="dtype='int8': use float32 or bfloat16"):
        shards.Shards(tmp_path, "int8")
    with pytest.raises(ValueError, match="features of another dtype than bfloat16"):
        shards.Shards(tmp_path, "bfloat16")
