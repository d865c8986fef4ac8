"""Rows of different widths side by side: `[B, W]` tokens as N columns.

Products cost by the column, so rows that want few of them leave theirs to others; what
belongs together by row, attention above all, finds its columns here.
"""

import jax.numpy as jnp
from flax import struct

from tlt_jax.types import Array


@struct.dataclass
class Ragged:
    """Which of N columns are which row's: neighbours, the rows in order.

    Columns behind the last row's are spare: they hold numbers that nobody reads.

    Attributes:
      starts: `[B] int32`, first column of each row.
      counts: `[B] int32`, columns of each row, at most W; their sum is at most N.
      width: W.
      num_columns: N.
    """

    starts: Array
    counts: Array
    width: int = struct.field(pytree_node=False)
    num_columns: int = struct.field(pytree_node=False)

    def columns(self, places: Array | None = None) -> Array:
        """Return the columns `[B, n]` of each row's tokens at `places [B, n]`.

        None stands for all W of them; beyond a row's count they are others' columns.
        """
        if places is None:
            places = jnp.arange(self.width, dtype=jnp.int32)[None]
        return jnp.minimum(self.starts[:, None] + places, self.num_columns - 1)

    def owners(self) -> Array:
        """Say whose each column is, `[N] int32`; spare ones are the last's."""
        column = jnp.arange(self.num_columns, dtype=jnp.int32)
        stops = self.starts + self.counts
        # Rows that end at or before a column stand before its own.
        row = jnp.sum(stops[None, :] <= column[:, None], axis=1)
        return jnp.minimum(row, self.starts.shape[0] - 1)

    def pack(self, x: Array) -> Array:
        """Bring `[..., B, W]` side by side, `[..., 1, N]`."""
        column, row = jnp.arange(self.num_columns, dtype=jnp.int32), self.owners()
        place = jnp.clip(column - self.starts[row], 0, self.width - 1)
        return x[..., row, place][..., None, :]

    def unpack(self, x: Array) -> Array:
        """Bring `[..., 1, N]` into rows, `[..., B, W]`; see `columns`."""
        return x[..., 0, self.columns()]


def of_counts(counts: Array, width: int, num_columns: int) -> Ragged:
    """Lay rows of `counts [B] int32` columns side by side.

    None has more than `width`, and all together have at most `num_columns`.
    """
    stops = jnp.cumsum(counts)
    return Ragged(stops - counts, counts, width, num_columns)
