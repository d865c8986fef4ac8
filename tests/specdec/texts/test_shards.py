"""Texts on disk, and their places in batches."""

import numpy as np
import pytest

from tests.specdec import tiny_drafter
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


@pytest.mark.parametrize(
    ("length", "start", "expected"), [(9, 4, 5), (9, 1, 7), (4, 4, 0), (3, 2, 1)]
)
def test_number_of_bases(length, start, expected):
    positions = [t for t in range(length - 2) if t + 2 >= max(start, 2)]
    assert layout.num_bases(length, start) == len(positions) == expected


def test_plan_holds_every_text_once_within_the_sizes(tmp_path):
    rng = np.random.default_rng(0)
    buffer = shards.Shards(tmp_path, "float32")
    buffer.append([made(i, int(n), 3) for i, n in enumerate(rng.integers(4, 30, 60))])
    sizes = {"row_tokens": 24, "row_bases": 14, "num_rows": 3}
    plan = layout.plan(buffer, range(60), seed=(0, 1), **sizes)
    assert plan == layout.plan(buffer, range(60), seed=(0, 1), **sizes)
    assert plan != layout.plan(buffer, range(60), seed=(0, 2), **sizes)
    spans = [span for batch in plan for row in batch for span in row]
    assert sorted(span.index for span in spans) == list(range(60))
    for batch in plan:
        assert len(batch) == 3
        for row in batch:
            assert sum(span.num_tokens for span in row) <= 24
            assert sum(span.num_bases for span in row) <= 14
    for span in spans:
        length = min(int(buffer.lengths[span.index]), 24)
        there = layout.num_bases(length, 3)
        assert span.num_bases == min(there, 14)
        assert 1 <= span.first_base <= 1 + there - span.num_bases
    # Texts are about 16 tokens, so that most rows hold more than one.
    assert len(plan) * 3 < 60


def test_row_holds_texts_with_positions_counted_anew(tmp_path):
    records = [tiny_drafter.record(1, 6, 3), tiny_drafter.record(2, 5, 2)]
    buffer = tiny_drafter.buffer_of(tmp_path, records)
    (rows,) = layout.plan(
        buffer, [0, 1], row_tokens=13, row_bases=8, num_rows=1, seed=None
    )
    batch = layout.lay_out(buffer, rows, row_tokens=13, row_bases=8)
    both = np.concatenate([record.tokens for record in records])
    np.testing.assert_array_equal(batch.tokens[0], [*both, 0, 0])
    np.testing.assert_array_equal(batch.positions[0], [*range(6), *range(5), 0, 0])
    np.testing.assert_array_equal(batch.segment[0], [0] * 6 + [1] * 5 + [-1] * 2)
    # The base behind which the response's first token comes is two columns before it.
    np.testing.assert_array_equal(batch.bases[0], [1, 2, 3, 6, 7, 8, 0, 0])
    assert batch.valid[0].tolist() == [True] * 6 + [False] * 2
    np.testing.assert_array_equal(batch.features[0, 6:11], records[1].features)
    np.testing.assert_array_equal(batch.keys[0, 3], records[1].key)
