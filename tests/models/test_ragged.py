"""Rows side by side: each column is the one token that a slow form says."""

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models import ragged

WIDTH, NUM = 4, 11
COUNTS = (3, 0, 4, 1)
# Rows and places of the columns; three behind them are spare.
TOKENS = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]


def test_columns_are_rows_side_by_side():
    rows = ragged.of_counts(jnp.array(COUNTS), WIDTH, NUM)
    assert rows.starts.tolist() == [0, 3, 3, 7]
    x = np.arange(2 * 4 * WIDTH).reshape(2, 4, WIDTH)
    packed = jax.jit(lambda rows, x: rows.pack(x))(rows, x)
    assert packed.shape == (2, 1, NUM)
    for column, (row, place) in enumerate(TOKENS):
        assert packed[:, 0, column].tolist() == x[:, row, place].tolist()
    back = jax.jit(lambda rows, x: rows.unpack(x))(rows, packed)
    assert back.shape == x.shape
    for row, place in TOKENS:
        assert back[:, row, place].tolist() == x[:, row, place].tolist()
    places = np.array([[2], [0], [1], [0]])
    assert rows.columns(places)[:, 0].tolist() == [2, 3, 4, 7]
