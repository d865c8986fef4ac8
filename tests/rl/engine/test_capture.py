"""Texts read from pages: which columns they are made of, and which are chosen.

That the features are those of a forward, `tests.rl.workers.test_workers` shows.
"""

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.engine import capture, scheduler


def row_of(num_prompt, tokens, length):
    prompt = np.arange(10, 10 + num_prompt, dtype=np.int32)
    return scheduler.Row(
        types.Request(77, 5, 0, prompt, 9), list(tokens), length=length
    )


def pages_of(count, num_features, size):
    """Feature f of position t is 10 t + f."""
    position = np.arange(count * size).reshape(count, 1, size)
    columns = 10 * position + np.arange(num_features)[None, :, None]
    return columns.astype(np.float32)


@pytest.mark.parametrize("num_fused", [0, 2])
def test_a_text_has_its_pages_columns_and_zeros_for_its_last_token(num_fused):
    row = row_of(3, [20, 21], length=4)
    key = np.array([1, 2], np.uint32)
    made = capture.record(
        row, pages_of(4, 3, 3), num_fused=num_fused, key=key, version=6
    )
    assert made.tokens.tolist() == [10, 11, 12, 20, 21]
    assert (made.text_id, made.response_start, made.version) == (77, 3, 6)
    assert made.key is key
    known = [[10 * t + f for f in range(3)] for t in range(4)] + [[0, 0, 0]]
    assert made.hidden.tolist() == [column[num_fused:] for column in known]
    if num_fused:
        assert made.features.tolist() == [column[:2] for column in known]
    else:
        assert made.features is None


def test_a_text_cut_by_a_stop_string_has_no_column_behind_it():
    # Seven positions were cached before the text was cut to five tokens.
    made = capture.record(
        row_of(3, [20, 21], length=7),
        pages_of(3, 1, 3),
        num_fused=0,
        key=np.zeros(2, np.uint32),
        version=0,
    )
    assert made.hidden[:, 0].tolist() == [0, 10, 20, 30, 40]


def test_the_same_share_is_chosen_always():
    chosen = [i for i in range(1000) if capture.is_chosen(i, 0.25)]
    assert len(chosen) == 251
    assert chosen[:6] == [0, 2, 5, 10, 13, 18]
    assert all(capture.is_chosen(i, 0.5) for i in chosen)
    assert all(capture.is_chosen(i, 1.0) for i in range(100))
    assert not any(capture.is_chosen(i, 0.0) for i in range(100))
