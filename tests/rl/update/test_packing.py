"""Packed rows against the padded form, and as laws over random batches."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rl.update import padding
from tlt_jax.models import rows as rows_lib
from tlt_jax.rl.update import packing


def make_groups(sizes, seed=0):
    """Groups of (prompt length, response lengths) with random tokens."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(1, 1000, size=n).astype(np.int32)

    return [packing.Group(draw(p), tuple(draw(r) for r in rs)) for p, rs in sizes]


batches = st.lists(
    st.tuples(st.integers(1, 8), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
).filter(lambda sizes: any(r for _, rs in sizes for r in rs))
roundings = st.sampled_from(["power_of_two", 1, 8])
random_cases = settings(max_examples=60, deadline=None)

TWO = [
    packing.Group(np.array([9, 8, 7]), (np.array([1, 2, 3]), np.array([4, 5]))),
    packing.Group(np.array([6, 5]), (np.array([1, 1, 2, 3]),)),
]


def test_layout_of_two_groups():
    packed = packing.pack(TWO, row_tokens=16, rounding=8)
    expected = {
        "tokens": [9, 8, 7, 1, 2, 3, 4, 5, 6, 5, 1, 1, 2, 3, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0],
        "segment": [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, -1, -1],
        "prefix": [0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, -1, -1],
        "source": [2, 3, 4, 2, 6, 9, 10, 11, 12] + 7 * [0],
        "target": [1, 2, 3, 4, 5, 1, 1, 2, 3] + 7 * [0],
        "sequence": [0, 0, 0, 1, 1, 2, 2, 2, 2] + 7 * [0],
        "valid": 9 * [True] + 7 * [False],
        "index": [0, 1, 2, 3, 4, 5, 6, 7, 8] + 7 * [-1],
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(getattr(packed, name), [row], err_msg=name)
        assert getattr(packed, name).dtype == (bool if name == "valid" else np.int32)
    np.testing.assert_array_equal(packed.lengths, [3, 2, 4])
    assert packed.num_sequences == 4  # three responses, rounded up


def test_visible_of_two_groups():
    seen = packing.visible(packing.pack(TWO, row_tokens=16, rounding=8))[0]
    keys_of = {q: list(np.flatnonzero(seen[q])) for q in (2, 5, 7, 9, 13, 15)}
    assert keys_of == {
        2: [0, 1, 2],
        5: [0, 1, 2, 3, 4, 5],
        7: [0, 1, 2, 6, 7],
        9: [8, 9],
        13: [8, 9, 10, 11, 12, 13],
        15: [],
    }


def sees(packed):
    """Maps each predicted token to what its prediction sees, by position."""
    seen = packing.visible(packed)
    found = {}
    for row, m in zip(*np.nonzero(packed.valid), strict=True):
        keys = np.flatnonzero(seen[row, packed.source[row, m]])
        context = sorted(
            zip(packed.positions[row, keys], packed.tokens[row, keys], strict=True)
        )
        found[int(packed.index[row, m])] = context
    return found


@given(batches, st.integers(0, 25), roundings)
@random_cases
def test_each_token_is_predicted_from_prompt_and_response_so_far(
    sizes, slack, rounding
):
    groups = make_groups(sizes)
    row_tokens = max(p + max(rs) for p, rs in sizes) + slack
    expected = [
        list(enumerate(np.concatenate([group.prompt, response[:j]])))
        for group in groups
        for response in group.responses
        for j in range(len(response))
    ]
    for form in (packing.pack, padding.pad, in_pairs):
        packed = form(groups, row_tokens=row_tokens, rounding=rounding)
        assert sees(packed) == dict(enumerate(expected))


# Rows of two answers at most, each behind a prompt of its own.
in_pairs = functools.partial(packing.pack, most_sequences=2)


@given(batches, st.integers(0, 25), roundings)
@random_cases
def test_in_pairs_prefix_alone_says_who_sees_whom(sizes, slack, rounding):
    row_tokens = max(p + max(rs) for p, rs in sizes) + slack
    packed = in_pairs(make_groups(sizes), row_tokens=row_tokens, rounding=rounding)
    same = packed.prefix[:, :, None] == packed.prefix[:, None]
    same &= packed.prefix[:, None] >= 0
    np.testing.assert_array_equal(np.tril(same), packing.visible(packed))
    for row in packed.prefix:
        assert len(set(row[row >= 0])) <= 2


@given(batches, st.integers(0, 25), roundings, st.sampled_from([1, 2, 3]))
@random_cases
def test_every_response_token_is_target_once(sizes, slack, rounding, rows):
    groups = make_groups(sizes)
    row_tokens = max(p + max(rs) for p, rs in sizes) + slack
    flat = np.concatenate([r for g in groups for r in g.responses])
    for form in (packing.pack, padding.pad):
        packed = form(
            groups, row_tokens=row_tokens, rounding=rounding, rows_multiple=rows
        )
        assert packed.tokens.shape[1] <= row_tokens
        assert packed.tokens.shape[0] % rows == 0
        np.testing.assert_array_equal(
            np.sort(packed.index[packed.valid]), np.arange(len(flat))
        )
        np.testing.assert_array_equal(
            packed.target[packed.valid], flat[packed.index[packed.valid]]
        )
        owner = np.repeat(np.arange(len(packed.lengths)), packed.lengths)
        for part in packing.split(packed, rows):
            ids = part.sequence[part.valid]
            assert ids.min(initial=0) >= 0
            assert ids.max(initial=0) < part.num_sequences
            owners = owner[part.index[part.valid]]
            # One sequence id for each completion, and one completion for each id.
            pairs = set(zip(ids.tolist(), owners.tolist(), strict=True))
            assert (
                len(pairs) == len({i for i, _ in pairs}) == len({o for _, o in pairs})
            )
            for completion in set(owners.tolist()):
                assert (owners == completion).sum() == packed.lengths[completion]


@given(batches, st.sampled_from([1, 2, 3]), st.randoms(use_true_random=False))
@random_cases
def test_gather_and_scatter_are_inverse(sizes, rows, random):
    groups = make_groups(sizes)
    row_tokens = max(p + max(rs) for p, rs in sizes) + 3
    packed = packing.pack(groups, row_tokens=row_tokens, rows_multiple=rows)
    values = [
        np.array([random.random() for _ in range(n)], np.float32)
        for n in packed.lengths
    ]
    parts = packing.split(packed, rows)
    gathered = [packing.gather(part, values) for part in parts]
    for part, array in zip(parts, gathered, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array[~part.valid], 0)
    back = packing.scatter(parts, gathered)
    assert len(back) == len(values)
    for one, other in zip(back, values, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gather_repeats_one_number_per_completion():
    packed = packing.pack(TWO, row_tokens=16, rounding=8)
    gathered = packing.gather(packed, np.array([0.5, -1.0, 2.0]))
    np.testing.assert_array_equal(
        gathered, [[0.5] * 3 + [-1.0] * 2 + [2.0] * 4 + [0.0] * 7]
    )


def test_scatter_pads_what_no_part_holds():
    packed = packing.pack(TWO, row_tokens=8, rounding=1)
    first, second = packing.split(packed, 1)
    back = packing.scatter([first], [first.target.astype(np.float32)])
    np.testing.assert_array_equal(back[0], [1, 2, 3])
    np.testing.assert_array_equal(back[2], np.zeros(4))


def test_first_fit_decreasing_fills_rows():
    # Trees of 9, 5, 4 and 2 columns: {9, 2} and {5, 4} where rows are of 11.
    groups = make_groups([(2, [2]), (4, [5]), (1, [1]), (2, [3])])
    packed = packing.pack(groups, row_tokens=11, rounding=11)
    assert packed.tokens.shape == (2, 11)
    np.testing.assert_array_equal((packed.segment >= 0).sum(axis=1), [11, 9])


def test_large_group_is_split_with_its_prompt_copied():
    groups = make_groups([(4, [6, 6, 2, 2])])
    packed = packing.pack(groups, row_tokens=12, rounding=1)
    # Responses share 8 columns beside the prompt: {6, 2} and {6, 2}.
    assert packed.tokens.shape == (2, 12)
    for row in packed.tokens:
        np.testing.assert_array_equal(row[:4], groups[0].prompt)


@pytest.mark.parametrize(
    "sizes,width,rows",
    [
        # Whole groups fill two of the widest rows by half: three quarters are enough.
        ([(4, [4, 4]), (4, [4, 4])], 12, [[(0, 2)], [(1, 2)]]),
        # Whole groups would take three rows of 12; spread out they fill two of 16.
        (
            [(1, [4, 3, 3]), (1, [4, 3, 3]), (1, [3, 3])],
            16,
            [[(0, 3), (1, 1)], [(1, 2), (2, 2)]],
        ),
        # A long prompt is not copied where that costs more than it fills.
        ([(8, [2, 2, 2]), (8, [2, 2, 2])], 16, [[(0, 3)], [(1, 3)]]),
    ],
)
def test_the_layout_with_the_fewest_columns_is_chosen(sizes, width, rows):
    groups = make_groups(sizes)
    packed = packing.pack(groups, row_tokens=16, rounding=4)
    found = []
    for tokens, prefix, segment in zip(
        packed.tokens, packed.prefix, packed.segment, strict=True
    ):
        trees = []
        for first in sorted(set(prefix[prefix >= 0].tolist())):
            here = prefix == first
            prompt = tokens[here & (segment == first)]
            (group,) = (
                i for i, g in enumerate(groups) if np.array_equal(g.prompt, prompt)
            )
            trees.append((group, len(set(segment[here].tolist())) - 1))
        found.append(trees)
    assert (packed.tokens.shape[1], sorted(found)) == (width, sorted(rows))


@random_cases
@given(batches, st.integers(0, 40), st.sampled_from([1, 4, 8]), st.integers(1, 3))
def test_no_layout_has_more_columns_than_whole_groups_take(
    sizes, slack, rounding, multiple
):
    groups = make_groups(sizes)
    kept = [(len(g.prompt), [len(r) for r in g.responses]) for g in groups]
    row_tokens = slack + max(p + sum(rs) for p, rs in kept if sum(rs))
    packed = packing.pack(
        groups, row_tokens=row_tokens, rounding=rounding, rows_multiple=multiple
    )
    trees = [p + sum(rs) for p, rs in kept if sum(rs)]
    bins = rows_lib.first_fit_decreasing(trees, row_tokens)
    longest = max(sum(trees[i] for i in members) for members in bins)
    width = min(-(-longest // rounding) * rounding, row_tokens)
    num_rows = -(-len(bins) // multiple) * multiple
    assert packed.tokens.size <= num_rows * width


def test_shapes_are_rounded():
    groups = make_groups([(5, [6, 2]), (5, [6, 2])])
    packed = packing.pack(groups, row_tokens=64, rounding=8, rows_multiple=4)
    assert packed.tokens.shape == (4, 16) and packed.target.shape == (4, 8)
    packed = packing.pack(groups, row_tokens=30, rounding="power_of_two")
    assert packed.tokens.shape == (1, 30) and packed.target.shape == (1, 16)


def test_parts_share_shapes_and_number_sequences_alike():
    groups = make_groups([(3, [4, 4]), (3, [4]), (3, [2, 1]), (3, [5])])
    packed = packing.pack(groups, row_tokens=12, rounding=1, rows_multiple=2)
    parts = packing.split(packed, 2)
    assert len(parts) == packed.tokens.shape[0] // 2 > 1
    for field in dataclasses.fields(packing.Packed):
        if field.name != "row_sequences":
            assert len({getattr(p, field.name).shape for p in parts}) == 1
    assert len({part.num_sequences for part in parts}) == 1
    assert packed.sequence.max() >= parts[0].num_sequences  # else nothing is shown


def test_rows_of_padding_alone_hold_nothing():
    packed = packing.pack(TWO, row_tokens=16, rows_multiple=4)
    empty = packing.split(packed, 1)[-1]
    assert not empty.valid.any() and (empty.segment == -1).all()
    assert not packing.visible(empty).any()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: packing.pack(TWO, row_tokens=5),
            r"row_tokens=5 .* 3 prompt and 3 response tokens in groups\[0\]",
        ),
        (lambda: packing.pack([], row_tokens=5), "nothing to pack"),
        (
            lambda: packing.pack(make_groups([(2, [0, 0])]), row_tokens=5),
            "nothing to pack",
        ),
        (
            lambda: packing.split(packing.pack(TWO, row_tokens=16, rows_multiple=3), 2),
            "does not divide the 3 rows",
        ),
        (
            lambda: packing.gather(
                packing.pack(TWO, row_tokens=16), [np.ones(3), np.ones(4), np.ones(2)]
            ),
            r"\[3, 4, 2\] .* \[3, 2, 4\]",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_uniform_shapes_depend_on_width_and_count_alone():
    def shapes(sizes):
        packed = packing.pack(
            make_groups(sizes), row_tokens=32, rounding=8, uniform=True
        )
        (part,) = packing.split(packed, 1)
        return part.tokens.shape, part.target.shape, part.num_sequences

    assert shapes([(9, [4]), (1, [1, 3])]) == ((1, 24), (1, 24), 4)
    assert shapes([(2, [15, 0, 0])]) == ((1, 24), (1, 24), 4)
