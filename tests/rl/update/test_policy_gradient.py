"""What the learner reads of a packed batch, number by number."""

import dataclasses

import numpy as np
import pytest

from tlt_jax.rl.update import packing, policy_gradient

# Completions of 2, 1 and 3 tokens; the second group is the larger and comes first.
GROUPS = [
    packing.Group(np.array([50], np.int32), (np.array([7, 8], np.int32),)),
    packing.Group(
        np.array([60, 61], np.int32),
        (np.array([3], np.int32), np.array([4, 5, 6], np.int32)),
    ),
]
OLD, ROLLOUT, REFERENCE = (
    [np.array(values, np.float64) for values in made]
    for made in (
        ([-0.1, -0.2], [-0.3], [-0.4, -0.5, -0.6]),
        ([-1.1, -1.2], [-1.3], [-1.4, -1.5, -1.6]),
        ([-2.1, -2.2], [-2.3], [-2.4, -2.5, -2.6]),
    )
)
# Where nothing is predicted.
NO = 0.0


@pytest.fixture(scope="module")
def packed():
    return packing.pack(GROUPS, row_tokens=6, rounding=1)


def test_rows_and_columns(packed):
    batch = policy_gradient.micro_batch(
        packed,
        advantages=np.array([0.5, -1.0, 2.0]),
        weights=np.array([0.25, 0.125, 0.0625]),
        old_logprobs=OLD,
        rollout_logprobs=ROLLOUT,
        ref_logprobs=REFERENCE,
    )
    expected = {
        "tokens": [[60, 61, 3, 4, 5, 6], [50, 7, 8, 0, 0, 0]],
        "positions": [[0, 1, 2, 2, 3, 4], [0, 1, 2, 0, 0, 0]],
        "segment": [[0, 0, 1, 2, 2, 2], [0, 1, 1, -1, -1, -1]],
        "prefix": [[0, 0, 0, 0, 0, 0], [0, 0, 0, -1, -1, -1]],
        "source": [[1, 1, 3, 4], [0, 1, 0, 0]],
        "target": [[3, 4, 5, 6], [7, 8, 0, 0]],
    }
    fields = {f.name for f in dataclasses.fields(batch.rows)}
    assert fields == expected.keys() | {"routes", "share"}
    assert batch.rows.routes is None and batch.rows.share is None  # of dense blocks
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(batch.rows, name), values, name)
    valid = np.array([[True] * 4, [True, True, False, False]])
    np.testing.assert_array_equal(batch.columns.valid, valid)
    # Two sequences a row, numbered on.
    np.testing.assert_array_equal(
        batch.columns.sequence_ids, [[0, 1, 1, 1], [2, 2, 0, 0]]
    )
    assert batch.num_sequences == 4
    floats = {
        "advantages": [[-1.0, 2.0, 2.0, 2.0], [0.5, 0.5, NO, NO]],
        "weights": [[0.125, 0.0625, 0.0625, 0.0625], [0.25, 0.25, NO, NO]],
        "old_logprobs": [[-0.3, -0.4, -0.5, -0.6], [-0.1, -0.2, NO, NO]],
        "rollout_logprobs": [[-1.3, -1.4, -1.5, -1.6], [-1.1, -1.2, NO, NO]],
        "ref_logprobs": [[-2.3, -2.4, -2.5, -2.6], [-2.1, -2.2, NO, NO]],
    }
    for name, values in floats.items():
        found = getattr(batch.columns, name)
        assert found.dtype == np.float32, name
        np.testing.assert_array_equal(
            np.where(valid, found, NO), np.array(values, np.float32), name
        )


def test_routes_stand_at_their_texts_positions(packed):
    """`[m, L = 1, C = 2]` of each completion; of its last token they are not known."""
    texts = [len(g.prompt) + len(r) for g in GROUPS for r in g.responses]
    routes = [
        np.uint8([[[10 * i + t, 99]] for t in range(n - 1)])
        for i, n in enumerate(texts)
    ]
    batch = policy_gradient.micro_batch(
        packed,
        advantages=np.zeros(3),
        weights=np.ones(3),
        routes=routes,
        num_experts=100,
        num_tokens=9,
    )
    assert batch.rows.routes.dtype == np.uint8
    found, no = batch.rows.routes[:, :, 0], 100
    # The first row has the later group, whose prompt is its first response's.
    np.testing.assert_array_equal(
        found[..., 0], [[10, 11, no, 22, 23, no], [0, 1, no, no, no, no]]
    )
    assert ((found[..., 1] == 99) == (found[..., 0] < no)).all()
    np.testing.assert_array_equal(batch.rows.share, np.float32([6 / 9, 3 / 9]))


@pytest.mark.parametrize("name", ["old", "rollout", "ref"])
def test_what_is_not_given_is_absent(packed, name):
    names = {"old": OLD, "rollout": ROLLOUT, "ref": REFERENCE}
    batch = policy_gradient.micro_batch(
        packed,
        advantages=np.zeros(3),
        weights=np.ones(3),
        **{f"{name}_logprobs": names[name]},
    )
    for other, values in names.items():
        found = getattr(batch.columns, f"{other}_logprobs")
        if other == name:
            assert found[1, 1] == np.float32(values[0][1])
        else:
            assert found is None


def test_a_part_has_its_own_of_the_whole_batchs_numbers(packed):
    first, second = packing.split(packed, 1)
    numbers = dict(advantages=np.array([0.5, -1.0, 2.0]), weights=np.ones(3))
    made = [
        policy_gradient.micro_batch(part, **numbers, old_logprobs=OLD)
        for part in (first, second)
    ]
    np.testing.assert_array_equal(made[0].columns.advantages, [[-1, 2, 2, 2]])
    np.testing.assert_array_equal(made[1].columns.advantages[:, :2], [[0.5, 0.5]])
    np.testing.assert_array_equal(
        made[1].columns.old_logprobs[:, :2], np.float32([[-0.1, -0.2]])
    )
    # One bound for parts of one shape: they share a program.
    assert [batch.num_sequences for batch in made] == [2, 2]
