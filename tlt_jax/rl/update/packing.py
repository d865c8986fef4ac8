"""Packing of prompt groups into rows that hold each prompt once.

A group (a prompt and its R responses) is a tree of two levels, and a row of length T
holds the trees of one or more groups:

    tokens      p p p a a a b b q q c c c c . .     p, q prompts; a, b answer p, c q
    positions   0 1 2 3 4 5 3 4 0 1 2 3 4 5 . .     responses continue their prompt
    segment     0 0 0 1 1 1 2 2 3 3 4 4 4 4 - -
    prefix      0 0 0 0 0 0 0 0 3 3 3 3 3 3 - -     the prompt's segment

A query sees the earlier keys of its own segment and of its prompt (`visible`). Response
token j is predicted at response token j - 1, and token 0 at the prompt's last token,
which thus predicts one token of every response: so predictions are listed apart from
the columns that make them (`source`, `target`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tlt_jax.rl.update import row_filling

_COLUMNS = ("tokens", "positions", "segment", "prefix", "owner")
_PREDICTIONS = ("source", "target", "sequence", "index")
_PADDING = {"segment": -1, "prefix": -1, "owner": -1, "index": -1}


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and its responses.

    Attributes:
      prompt: `[n >= 1] int32`.
      responses: R arrays `[length] int32`, EOS included; an empty one is a dropped
        response, which is counted in `Packed.lengths` and takes no room.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of packed groups: B rows of T columns and at most M predictions each.

    Completions are numbered over all groups in the order given, and their tokens lie
    end to end in one flat list, which `index` points into.

    Attributes:
      tokens: `[B, T] int32`, padding 0.
      positions: `[B, T] int32`, padding 0.
      segment: `[B, T] int32`, number of the prompt or response in its row, padding -1.
      prefix: `[B, T] int32`, segment of the column's prompt, padding -1.
      owner: `[B, T] int32`, completion whose text the column is of, of a prompt that
        of its first response, padding -1.
      source: `[B, M] int32`, column of the row whose logits predict, padding 0.
      target: `[B, M] int32`, token predicted, padding 0.
      sequence: `[B, M] int32`, the response, in [0, num_sequences), padding 0.
      valid: `[B, M]` bool, the prediction exists.
      index: `[B, M] int32`, place of `target` in the flat list, padding -1.
      lengths: `[n] int32`, length of every completion of the whole batch, also in the
        parts that `split` makes.
      row_sequences: bound on the responses in one row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment: np.ndarray
    prefix: np.ndarray
    owner: np.ndarray
    source: np.ndarray
    target: np.ndarray
    sequence: np.ndarray
    valid: np.ndarray
    index: np.ndarray
    lengths: np.ndarray
    row_sequences: int

    @property
    def num_sequences(self) -> int:
        """Static bound on `sequence`; the same for all parts of equal row count."""
        return self.tokens.shape[0] * self.row_sequences


def pack(
    groups: Sequence[Group],
    *,
    row_tokens: int,
    rows_multiple: row_filling.Rounding = 1,
    rounding: row_filling.Rounding = "power_of_two",
    uniform: bool = False,
    most_sequences: int | None = None,
) -> Packed:
    """Packs groups into few columns, each prompt computed once per row it appears in.

    Rows and their width are those of `row_filling.choose`: a group may be split,
    responses kept whole, and its parts then have a copy of the prompt each.
    Deterministic in its input.

    Args:
      groups: at least one with a response that is not empty.
      row_tokens: most columns in a row.
      rows_multiple: B is rounded up to it, so that `split` divides evenly.
      rounding: T and M are rounded up to it (but T not beyond `row_tokens`), so that
        few shapes are compiled: a multiple or `power_of_two`.
      uniform: M is T and `row_sequences` bounds all n completions, so that T and n
        alone decide what a micro-batch compiles.
      most_sequences: give each response a prompt of its own, and a row this many pairs
        at most, as kernels want them (`models.flash_attention`); None: trees.

    Raises:
      ValueError: a prompt with one response exceeds `row_tokens`, or there is nothing
        to pack.
    """
    trees = _trees(groups, row_tokens)
    if most_sequences is not None:
        trees = [
            row_filling.Tree(tree.prompt, (response,))
            for tree in trees
            for response in tree.responses
        ]
    rows, width = row_filling.choose(
        trees,
        row_tokens=row_tokens,
        rows_multiple=rows_multiple,
        rounding=rounding,
        most_trees=most_sequences,
    )
    return _lay_out(rows, groups, width, rows_multiple, rounding, uniform)


def split(packed: Packed, rows_per_micro_batch: int) -> list[Packed]:
    """Cuts B rows into micro-batches of equal shape, `sequence` counted anew in each.

    Returns:
      `B / rows_per_micro_batch` parts; none of them shares a response with another.

    Raises:
      ValueError: the rows do not divide evenly.
    """
    num_rows = packed.tokens.shape[0]
    if rows_per_micro_batch < 1 or num_rows % rows_per_micro_batch:
        raise ValueError(
            f"rows_per_micro_batch={rows_per_micro_batch} does not divide the "
            f"{num_rows} rows: pack with rows_multiple=rows_per_micro_batch."
        )
    parts = []
    for start in range(0, num_rows, rows_per_micro_batch):
        rows = slice(start, start + rows_per_micro_batch)
        arrays = {
            field.name: getattr(packed, field.name)[rows]
            for field in dataclasses.fields(Packed)
            if field.name not in ("lengths", "row_sequences")
        }
        counted = arrays["sequence"] - start * packed.row_sequences
        arrays["sequence"] = np.where(arrays["valid"], counted, 0).astype(np.int32)
        parts.append(dataclasses.replace(packed, **arrays))
    return parts


def gather(packed: Packed, values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Lays values of completions out over predictions, 0 where there is none.

    Args:
      packed: the layout, whole or a part of it.
      values: either n arrays, `[length_i]` for completion i (log-probabilities), or one
        array `[n]`, a number for each completion (advantages, weights).

    Returns:
      `[B, M]` of the values' dtype.

    Raises:
      ValueError: the number of completions or a length differs from the layout's.
    """
    if getattr(values, "ndim", None) == 1:
        flat = np.repeat(np.asarray(values), packed.lengths)
    else:
        lengths = np.array([len(array) for array in values], np.int32)
        if not np.array_equal(lengths, packed.lengths):
            raise ValueError(
                f"values are for completions of lengths {_short(lengths)}, but the "
                f"layout's are {_short(packed.lengths)}: give them in the order they "
                "were packed."
            )
        flat = np.concatenate([np.asarray(array) for array in values])
    return np.where(packed.valid, flat[np.maximum(packed.index, 0)], 0)


def gather_columns(
    packed: Packed, values: Sequence[np.ndarray], fill: int
) -> np.ndarray:
    """Lays values of text positions out over columns, see `Packed.owner`.

    Args:
      packed: the layout, whole or a part of it.
      values: for each completion `[m_i, ...]`, of its text's first m_i positions.
      fill: what stands where there is no value.

    Returns:
      `[B, T, ...]` of the values' dtype.
    """
    laid_out = np.full(
        (*packed.owner.shape, *values[0].shape[1:]), fill, values[0].dtype
    )
    for number in np.unique(packed.owner[packed.owner >= 0]):
        own = values[number]
        is_known = (packed.owner == number) & (packed.positions < len(own))
        laid_out[is_known] = own[packed.positions[is_known]]
    return laid_out


def scatter(parts: Sequence[Packed], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Brings values of predictions back to completions; the inverse of `gather`.

    Args:
      parts: layouts of one batch, `[packed]` or what `split` gave, not necessarily all
        but at least one.
      values: `[B, M]` for each part.

    Returns:
      n arrays, `[length_i]` for completion i, of the values' dtype; 0 for a token that
      lies in none of the parts.

    Raises:
      ValueError: counts differ.
    """
    lengths = parts[0].lengths
    flat = np.zeros(int(lengths.sum()), values[0].dtype)
    for part, array in zip(parts, values, strict=True):
        flat[part.index[part.valid]] = array[part.valid]
    return np.split(flat, np.cumsum(lengths)[:-1])


def visible(packed: Packed) -> np.ndarray:
    """Says which keys each query sees: the slow form of the attention mask.

    Key k is visible to query q of its row iff `k <= q`, `segment[k] >= 0`, and
    `segment[k]` is `segment[q]` or `prefix[q]`. A padding query sees nothing.

    Returns:
      `[B, T, T]` bool, query before key.
    """
    segment_q, prefix_q = packed.segment[:, :, None], packed.prefix[:, :, None]
    segment_k = packed.segment[:, None, :]
    column = np.arange(packed.tokens.shape[1])
    return (
        (column[None, :] <= column[:, None])
        & (segment_k >= 0)
        & ((segment_k == segment_q) | (segment_k == prefix_q))
    )


def _trees(groups: Sequence[Group], row_tokens: int) -> list[row_filling.Tree]:
    """Numbers the completions and drops the empty ones."""
    trees = []
    number = 0
    for index, group in enumerate(groups):
        responses = []
        for tokens in group.responses:
            if len(tokens):
                responses.append((number, np.asarray(tokens)))
            number += 1
        if responses:
            tree = row_filling.Tree(np.asarray(group.prompt), tuple(responses))
            if tree.least_width > row_tokens:
                longest = tree.least_width - len(tree.prompt)
                raise ValueError(
                    f"row_tokens={row_tokens} is less than the {len(tree.prompt)} "
                    f"prompt and {longest} response tokens in groups[{index}]: raise "
                    "row_tokens or limit the lengths."
                )
            trees.append(tree)
    if not trees:
        raise ValueError(
            f"the {len(groups)} groups hold no response token: there is nothing to "
            "pack; skip this update."
        )
    return trees


def _lay_out(
    rows: Sequence[Sequence[row_filling.Tree]],
    groups: Sequence[Group],
    num_columns: int,
    rows_multiple: row_filling.Rounding,
    rounding: row_filling.Rounding,
    uniform: bool,
) -> Packed:
    """Writes the trees of each row into arrays of this width and rounded shape."""
    lengths = np.array([len(r) for g in groups for r in g.responses], np.int32)
    starts = np.cumsum(lengths) - lengths
    if uniform:
        num_predictions, most_sequences = num_columns, len(lengths)
    else:
        most = max(sum(tree.num_predictions for tree in row) for row in rows)
        num_predictions = min(row_filling.round_up(most, rounding), num_columns)
        most_sequences = max(sum(len(tree.responses) for tree in row) for row in rows)
    num_rows = row_filling.round_up(len(rows), rows_multiple)
    row_sequences = row_filling.round_up(most_sequences, "power_of_two")

    widths = dict.fromkeys(_COLUMNS, num_columns)
    widths |= dict.fromkeys(_PREDICTIONS, num_predictions)
    arrays = {
        name: np.full((num_rows, width), _PADDING.get(name, 0), np.int32)
        for name, width in widths.items()
    }
    for row_index, row in enumerate(rows):
        for name, values in _row(row, row_index * row_sequences, starts).items():
            arrays[name][row_index, : len(values)] = values
    return Packed(
        **arrays,
        valid=arrays["index"] >= 0,
        lengths=lengths,
        row_sequences=row_sequences,
    )


def _row(
    row: Sequence[row_filling.Tree], first_sequence: int, starts: np.ndarray
) -> dict[str, np.ndarray]:
    """One row's arrays, without padding."""
    pieces: dict[str, list[np.ndarray]] = {
        name: [] for name in (*_COLUMNS, *_PREDICTIONS)
    }
    column = segment = sequence = 0

    def append(tokens, **arrays):
        for name, values in ({"tokens": tokens} | arrays).items():
            pieces[name].append(np.broadcast_to(values, tokens.shape))

    for tree in row:
        prefix = segment
        places = np.arange(len(tree.prompt))
        first = tree.responses[0][0]
        append(
            tree.prompt, positions=places, segment=segment, prefix=prefix, owner=first
        )
        column += len(tree.prompt)
        segment += 1
        last_of_prompt = column - 1
        for number, tokens in tree.responses:
            offsets = np.arange(len(tokens))
            append(
                tokens,
                positions=len(tree.prompt) + offsets,
                segment=segment,
                prefix=prefix,
                owner=number,
                source=np.where(offsets == 0, last_of_prompt, column + offsets - 1),
                target=tokens,
                sequence=first_sequence + sequence,
                index=starts[number] + offsets,
            )
            column += len(tokens)
            segment += 1
            sequence += 1
    return {name: np.concatenate(values) for name, values in pieces.items()}


def _short(lengths: np.ndarray) -> str:
    shown = ", ".join(map(str, lengths[:8]))
    return f"[{shown}{', ...' if len(lengths) > 8 else ''}] ({len(lengths)})"
