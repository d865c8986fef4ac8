"""Pictures of a step's records show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib import colors

from tlt_jax import types
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import experience, packing
from tlt_jax.viz import record_plots, style

REWARDS = np.array([[0.5, -1.0, 2.0], [0.0, 1.0, 0.25]])


def text_of(tokens):
    return "".join(chr(96 + t) for t in tokens)


def batch(num_groups=2):
    def completion(i):
        tokens = np.arange(1, 18 if i == 4 else 2 + i, dtype=np.int32)
        return types.Completion(i, tokens, np.zeros(len(tokens), np.float32), "eos")

    return experience.Experience(
        [
            prompts.Prompt(i, None, np.array([20 + i % 6, 7], np.int32))
            for i in range(num_groups)
        ],
        [completion(i) for i in range(3 * num_groups)],
        np.resize(REWARDS, (num_groups, 3)),
    )


def test_completions_stand_by_prompt_and_sample():
    fig = record_plots.completions(batch(), text_of)
    axes, bar = fig.axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), REWARDS)
    # Zero is white, whatever the largest reward.
    assert image.get_clim() == (-2.0, 2.0)
    assert min(image.cmap(0.5)) > 0.99
    assert colors.to_hex(image.cmap(1.0)).upper() == style.GREEN
    assert {t.get_text(): t.get_position() for t in axes.texts} == {
        "a": (0, 0),
        "ab": (1, 0),
        "abc": (2, 0),
        "abcd": (0, 1),
        # 17 letters: the first six and the last nine.
        "abcdef…ijklmnopq": (1, 1),
        "abcdef": (2, 1),
    }
    assert [t.get_text() for t in axes.get_yticklabels()] == ["tg", "ug"]
    assert [t.get_text() for t in axes.get_xticklabels()][2] == "sample 2"
    assert axes.get_title(loc="left") == "Completions, by reward"


def test_other_values_may_colour_them_and_ten_groups_are_shown():
    made, values = batch(12), np.arange(36.0).reshape(12, 3) - 40
    fig = record_plots.completions(made, text_of, values, "Advantages")
    axes = fig.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), values[:10])
    assert axes.images[0].get_clim() == (-40.0, 40.0)
    assert len(axes.texts) == 30 and len(axes.get_yticks()) == 10
    assert axes.get_title(loc="left") == "Advantages"
    # Nothing to tell apart is no division by zero.
    fig = record_plots.completions(made, text_of, np.zeros((12, 3)))
    assert fig.axes[0].images[0].get_clim() == (-1e-6, 1e-6)


def test_packed_rows_and_what_the_first_sees():
    groups = [
        packing.Group(
            np.array([60, 61], np.int32),
            (np.array([3], np.int32), np.array([4, 5, 6], np.int32)),
        ),
        packing.Group(np.array([50], np.int32), (np.array([7, 8], np.int32),)),
    ]
    part = packing.pack(groups, row_tokens=6, rounding=1)
    rows, seen = record_plots.packed(part).axes
    # Prompts 0, responses 2 more than their segment, padding nothing.
    shades = np.ma.filled(rows.images[0].get_array().astype(float), np.nan)
    no = np.nan
    expected = [[0, 0, 3, 4, 4, 4], [0, 3, 3, no, no, no]]
    np.testing.assert_array_equal(shades, expected)
    assert rows.get_ylim() == (3.5, -0.5)
    # Orange is what is seen of the prompt, blue of the response itself.
    np.testing.assert_array_equal(
        seen.images[0].get_array(),
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 2, 0, 0, 0],
            [1, 1, 0, 2, 0, 0],
            [1, 1, 0, 2, 2, 0],
            [1, 1, 0, 2, 2, 2],
        ],
    )
    assert seen.get_title(loc="left") == "what row 0 sees"


def test_of_a_long_row_the_first_columns_are_shown():
    group = packing.Group(
        np.arange(30, dtype=np.int32), (np.arange(80, dtype=np.int32),)
    )
    part = packing.pack([group], row_tokens=128, rounding=1)
    _, seen = record_plots.packed(part).axes
    assert seen.images[0].get_array().shape == (96, 96)
    assert seen.get_title(loc="left") == "what row 0 sees, its first 96 columns"


def test_an_update_moves_completions():
    before = [np.array([-1.0, -2.0]), np.array([-3.0]), np.array([-1.0, -1.0, -1.0])]
    after = [np.array([-0.5, -1.5]), np.array([-4.5]), np.array([-1.0, -1.0, -1.25])]
    fig = record_plots.change(before, after, np.array([2.0, -1.0, 0.0]))
    (axes,) = fig.axes
    (points,) = axes.collections
    np.testing.assert_allclose(
        points.get_offsets(), [[2.0, 1.0], [-1.0, -1.5], [0.0, -0.25]]
    )
    painted = [colors.to_hex(c).upper() for c in points.get_facecolors()]
    assert painted == [style.GREEN, style.RED, style.GREEN]
    with pytest.raises(ValueError, match="zip"):
        record_plots.change(before, after[:2], np.zeros(3))
