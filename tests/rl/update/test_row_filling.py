"""Which response lies in which row, by hand; the laws are in `test_packing`."""

import numpy as np
import pytest

from tlt_jax.rl.update import row_filling


def tree(prompt, *lengths):
    """A prompt of so many tokens with responses of these lengths, numbered from 0."""
    responses = tuple((i, np.zeros(n, np.int32)) for i, n in enumerate(lengths))
    return row_filling.Tree(np.zeros(prompt, np.int32), responses)


def shown(rows):
    """Each row as (prompt, numbers of its responses) of every tree."""
    return [
        [(len(t.prompt), [number for number, _ in t.responses]) for t in row]
        for row in rows
    ]


def choose(*trees, row_tokens=16, rows_multiple=1, rounding=1):
    rows, width = row_filling.choose(
        trees, row_tokens=row_tokens, rows_multiple=rows_multiple, rounding=rounding
    )
    return shown(rows), width


@pytest.mark.parametrize(
    ("value", "rounding", "rounded"),
    [
        *((1, "power_of_two", 1), (5, "power_of_two", 8), (8, "power_of_two", 8)),
        *((9, "power_of_two", 16), (1, 8, 8), (8, 8, 8), (9, 8, 16), (7, 1, 7)),
    ],
)
def test_sizes_are_rounded_up(value, rounding, rounded):
    assert row_filling.round_up(value, rounding) == rounded


def test_sizes_of_a_tree():
    one = tree(3, 2, 5)
    assert (one.size, one.num_predictions, one.least_width) == (10, 7, 8)


def test_what_fits_lies_in_one_row_that_is_no_wider():
    assert choose(tree(3, 2, 4), tree(2, 3)) == ([[(3, [0, 1]), (2, [0])]], 14)


def test_the_width_is_rounded_but_not_beyond_the_most():
    assert choose(tree(3, 2, 4), rounding="power_of_two") == ([[(3, [0, 1])]], 16)
    assert choose(tree(3, 2, 4), row_tokens=12, rounding="power_of_two")[1] == 12


def test_narrow_rows_are_taken_where_they_cost_less():
    # Two rows of 9 are 18 columns; rows of 16 would be two as well, or 32.
    assert choose(tree(4, 5), tree(3, 6)) == ([[(4, [0])], [(3, [0])]], 9)
    # To be had in fours they would be 36: one of 18 in four is 72, so narrow it stays.
    assert choose(tree(4, 5), tree(3, 6), row_tokens=20, rows_multiple=4)[1] == 9


def test_a_group_is_spread_at_the_price_of_a_copy_of_its_prompt():
    # 2 + 6 + 6 + 6 = 20 columns: beyond a row, so the prompt comes again. Three rows of
    # 8 cost less than two of 14; to be had in twos they would be four.
    assert choose(tree(2, 6, 6, 6)) == ([[(2, [i])] for i in range(3)], 8)
    assert choose(tree(2, 6, 6, 6), rows_multiple=2) == (
        [[(2, [0, 1])], [(2, [2])]],
        14,
    )
    # Two rows of 9 hold all, where whole groups need two of 10.
    rows, width = choose(tree(2, 7, 1), tree(1, 3, 2), row_tokens=12)
    assert (rows, width) == ([[(2, [0])], [(1, [0, 1]), (2, [1])]], 9)


def test_of_equals_the_fewest_rows_are_taken():
    # Two rows of 4 and one of 8 are 8 columns each.
    assert choose(tree(1, 3), tree(1, 3), row_tokens=8) == (
        [[(1, [0]), (1, [0])]],
        8,
    )
