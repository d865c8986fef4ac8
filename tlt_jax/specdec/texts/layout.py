"""A text with the target's features, and its place in a batch of rows.

A drafter learns from bases, the positions that drafting could start from; a row has
room for so many columns and so many bases. A text that exceeds it is cut to a span.
"""

import dataclasses
from collections.abc import Container, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models import rows as rows_lib
from tlt_jax.specdec.training import unroll


@dataclasses.dataclass(frozen=True)
class Record:
    """A text and what the target made of it.

    Attributes:
      text_id: unique in its buffer; decides the order of texts.
      tokens: `[n] int32`, prompt and response.
      response_start: index of the response's first token, at least 1.
      hidden: `[n, D]`, last features after the final norm.
      features: `[n, n_layers * D]`, or None where `hidden` is the feature.
      key: `[2] uint32`, the noise key that the response was drawn with.
      version: of the target's weights.
    """

    text_id: int
    tokens: np.ndarray
    response_start: int
    hidden: np.ndarray
    features: np.ndarray | None
    key: np.ndarray
    version: int = 0


class Texts(Protocol):
    """What `plan` and `lay_out` read: texts by their index.

    Attributes:
      lengths, response_starts: `[num_texts] int64`, tokens of every text, and where its
        response starts.
    """

    lengths: np.ndarray
    response_starts: np.ndarray

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Read the text at `index`."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A text in a row: its first `num_tokens` tokens and some of its bases.

    Attributes:
      index: of the text in the buffer.
      num_tokens: tokens laid out.
      first_base: position of the first base.
      num_bases: bases, one after the other.
    """

    index: int
    num_tokens: int
    first_base: int
    num_bases: int


def num_bases(length: int, response_start: int) -> int:
    """Count the bases of a text: positions t whose token t + 2 is the response's.

    The first has t = response_start - 2, as drafting starts there; of a prompt of one
    token it is t = 0.
    """
    return max(length - max(response_start, 2), 0)


def span_of(
    index: int,
    length: int,
    response_start: int,
    *,
    row_tokens: int,
    row_bases: int,
    rng: np.random.Generator | None,
) -> Span | None:
    """Cut a text to what a row can hold; None if no base is left.

    T and M are `row_tokens` and `row_bases`. A text longer than T loses its end; of one
    with more than M bases a run is taken, which `rng` draws; None: the first.
    """
    length = min(int(length), row_tokens)
    there = num_bases(length, int(response_start))
    if not there:
        return None
    taken = min(there, row_bases)
    skipped = 0 if rng is None else int(rng.integers(there - taken + 1))
    return Span(index, length, max(int(response_start) - 2, 0) + skipped, taken)


def plan(
    texts: Texts,
    indices: Sequence[int],
    *,
    row_tokens: int,
    row_bases: int,
    num_rows: int,
    seed: tuple[int, ...] | None,
) -> list[list[list[Span]]]:
    """Lay texts out over batches, each in one row, the first with room.

    Args:
      texts, indices: the texts, and which of them; those without a base are left out.
      row_tokens, row_bases: T and M, see `span_of`.
      num_rows: B.
      seed: numbers of the order and of the runs; None: the order given, and first runs.

    Returns:
      Batches of `num_rows` rows of spans; rows of the last may be empty.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    order = np.asarray(indices, np.int64)
    if rng is not None:
        order = rng.permutation(order)
    # Rows that are nearly full are looked at no more, so that a plan takes linear time.
    placed = rows_lib.Rows(row_tokens, row_bases, num_open=4 * num_rows)
    sizes = {"row_tokens": row_tokens, "row_bases": row_bases}
    lengths, starts = texts.lengths, texts.response_starts
    for index in order.tolist():
        span = span_of(index, lengths[index], starts[index], rng=rng, **sizes)
        if span is not None:
            placed.place(span, span.num_tokens, span.num_bases)
    rows = placed.items + [[]] * (-len(placed.items) % num_rows)
    return [rows[i : i + num_rows] for i in range(0, len(rows), num_rows)]


def lay_out(
    texts: Texts,
    rows: Sequence[Sequence[Span]],
    *,
    row_tokens: int,
    row_bases: int,
) -> unroll.Batch:
    """Make a batch in host memory of one of `plan`'s; see there for the arguments.

    Each text is read once and let go before the next one is.
    """
    columns = rows_lib.blank(len(rows), row_tokens)
    bases = np.zeros((len(rows), row_bases), np.int32)
    valid = np.zeros((len(rows), row_bases), bool)
    keys = np.zeros((len(rows), row_bases, 2), np.uint32)
    # As wide as the first text's; a batch without any takes the width of another.
    features: dict[str, np.ndarray | None] = {}
    for b, spans in enumerate(rows):
        first = base = 0
        for number, span in enumerate(spans):
            record = texts.read(span.index)
            features = features or _blank_features(record, len(rows), row_tokens)
            tokens = record.tokens[: span.num_tokens]
            here = rows_lib.write(columns, b, first, number, tokens)
            for name, array in features.items():
                if array is not None:
                    array[b, here] = getattr(record, name)[: span.num_tokens]
            there = (b, slice(base, base + span.num_bases))
            bases[there] = first + span.first_base + np.arange(span.num_bases)
            valid[there] = True
            keys[there] = record.key
            first, base = first + span.num_tokens, base + span.num_bases
    features = features or _blank_features(texts.read(0), len(rows), row_tokens)
    return unroll.Batch(**columns, **features, bases=bases, valid=valid, keys=keys)


def described(
    *,
    num_rows: int,
    row_tokens: int,
    row_bases: int,
    d_model: int,
    num_features: int,
    dtype: str,
) -> unroll.Batch:
    """Describe what `lay_out` returns, in shapes and dtypes.

    Rows are B of T and M; `num_features` layers of D are fused, 0: the last feature
    alone. `dtype` is that which features are kept in.
    """

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((num_rows, *shape), dtype)

    kept = jnp.dtype(dtype)
    fused = num_features * d_model
    return unroll.Batch(
        tokens=of(row_tokens),
        positions=of(row_tokens),
        segment=of(row_tokens),
        features=of(row_tokens, fused, dtype=kept) if fused else None,
        hidden=of(row_tokens, d_model, dtype=kept),
        bases=of(row_bases),
        valid=of(row_bases, dtype=bool),
        keys=of(row_bases, 2, dtype=jnp.uint32),
    )


def _blank_features(
    record: Record, num_rows: int, row_tokens: int
) -> dict[str, np.ndarray | None]:
    """Zeros for features as wide as a record's."""

    def blank(array):
        return np.zeros((num_rows, row_tokens, array.shape[1]), array.dtype)

    given = {"features": record.features, "hidden": record.hidden}
    return jax.tree.map(blank, given)


def check(record: Record, known: Container[int]) -> None:
    """Refuse a record whose arrays do not fit together.

    Raises:
      ValueError: its id is `known` already, or a shape is wrong.
    """
    length = len(record.tokens)
    if record.text_id in known:
        raise ValueError(f"text_id={record.text_id} is in the buffer already.")
    if not 1 <= record.response_start <= length:
        raise ValueError(
            f"text {record.text_id} has response_start={record.response_start} in "
            f"{length} tokens: a prompt has at least one token."
        )
    for name in ("hidden", "features"):
        array = getattr(record, name)
        if array is not None and (array.ndim != 2 or len(array) != length):
            raise ValueError(
                f"text {record.text_id} has {name} of shape {array.shape} for {length} "
                "tokens: give one row a token."
            )
