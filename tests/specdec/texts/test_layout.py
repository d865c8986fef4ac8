"""The places of texts in batches, cut to what rows hold."""

import jax
import numpy as np
import pytest

from tests.specdec import tiny_drafter
from tests.specdec.texts import test_shards
from tlt_jax.specdec.texts import layout, shards

made = test_shards.made


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


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_what_is_described_is_what_is_laid_out(tmp_path, layers):
    buffer = tiny_drafter.buffer_of(
        tmp_path, [tiny_drafter.record(1, 6, 3, layers=layers)]
    )
    sizes = {"row_tokens": 13, "row_bases": 8}
    wanted = layout.described(
        num_rows=2, d_model=16, num_features=len(layers), dtype="float32", **sizes
    )
    # A batch without a text, too, has features of the others' width.
    for rows in ([[layout.Span(0, 6, 1, 3)], []], [[], []]):
        batch = layout.lay_out(buffer, rows, **sizes)
        assert jax.tree.structure(batch) == jax.tree.structure(wanted)
        for got, described in zip(
            jax.tree.leaves(batch), jax.tree.leaves(wanted), strict=True
        ):
            assert (got.shape, got.dtype) == (described.shape, described.dtype)


def test_a_text_that_exceeds_its_row_is_cut():
    rng = np.random.default_rng(0)
    sizes = {"row_tokens": 10, "row_bases": 4}
    spans = {layout.span_of(7, 30, 3, rng=rng, **sizes) for _ in range(50)}
    # Bases are 1 to 7 of the first ten tokens, of which any four in a row are taken.
    assert spans == {layout.Span(7, 10, first, 4) for first in range(1, 5)}
    first = layout.span_of(7, 30, 3, rng=None, **sizes)
    assert first == layout.Span(7, 10, 1, 4)
    assert layout.span_of(7, 30, 11, rng=None, **sizes) is None
