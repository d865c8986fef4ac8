"""Rows that are filled first fit, and the columns of texts in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlt_jax.models import rows as rows_lib


def slow_first_fit(sizes, capacity, num_open):
    """Where each item goes, by looking at everything anew for each."""
    rows = []
    for item, size in enumerate(sizes):
        for row in rows[-num_open:] if num_open else rows:
            if all(
                sum(sizes[i][kind] for i in row) + size[kind] <= capacity[kind]
                for kind in range(len(capacity))
            ):
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=40),
    st.sampled_from([None, 1, 2, 5]),
)
def test_an_item_goes_to_the_first_row_with_room(sizes, num_open):
    rows = rows_lib.Rows(9, 5, num_open=num_open)
    places = [rows.place(i, *size) for i, size in enumerate(sizes)]
    assert rows.items == slow_first_fit(sizes, (9, 5), num_open)
    assert all(i in rows.items[row] for i, row in enumerate(places))


def test_no_more_rows_than_there_may_be():
    rows = rows_lib.Rows(5, max_rows=2)
    assert [rows.place(n, n) for n in (4, 3, 2, 3, 1)] == [0, 1, 1, None, 0]
    assert rows.items == [[4, 1], [3, 2]]


def test_rows_can_be_chosen_among():
    rows = rows_lib.Rows(5)
    for item in (3, 4, 5):
        rows.place(item, item)
    assert rows.find(1) == 0 and rows.find(1, among=[1, 2]) == 1
    assert rows.find(1, among=[2]) is None and rows.find(1, among=[]) is None
    rows.put("x", 1, 1)
    assert rows.items[1] == [4, "x"] and rows.find(1, among=[1, 2]) is None


def test_the_largest_go_first_and_ties_in_their_order():
    found = rows_lib.first_fit_decreasing([2, 5, 4, 2, 9], 11)
    assert found == [[4, 0], [1, 2, 3]]


def test_columns_of_texts_side_by_side():
    columns = rows_lib.blank(2, 6)
    first = rows_lib.write(columns, 1, 0, 0, np.array([7, 8, 9]))
    second = rows_lib.write(columns, 1, first.stop, 1, np.array([5, 6]))
    assert second == slice(3, 5)
    np.testing.assert_array_equal(columns["tokens"], [[0] * 6, [7, 8, 9, 5, 6, 0]])
    np.testing.assert_array_equal(columns["positions"], [[0] * 6, [0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(columns["segment"], [[-1] * 6, [0, 0, 0, 1, 1, -1]])
    with pytest.raises(ValueError, match="broadcast"):
        rows_lib.write(columns, 0, 4, 0, np.array([1, 2, 3]))
