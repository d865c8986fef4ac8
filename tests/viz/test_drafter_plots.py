"""The plot of a drafter's training: a curve for each depth, whatever was recorded."""

import math

import numpy as np
import pytest
from matplotlib import figure

from tests.viz import test_plots
from tlt_jax.viz import plots

ROWS = [
    {"step": 10, "loss": 2.5, "rates": [0.5, 0.25]},
    {"step": 20, "loss": None},
    {"step": 30, "loss": math.nan, "rates": [0.75, 0.5, 0.125]},
    {"step": 50, "loss": 1.5, "rates": None},
]


@pytest.fixture
def axes():
    return figure.Figure().subplots()


def lines(axes):
    return [(line.get_xdata(), line.get_ydata()) for line in axes.lines]


def test_a_number_is_one_curve(axes):
    plots.curves(axes, ROWS, "loss")
    ((steps, values),) = lines(axes)
    np.testing.assert_array_equal(steps, [10, 30, 50])
    np.testing.assert_array_equal(values, [2.5, np.nan, 1.5])
    assert axes.get_legend() is None


def test_a_list_is_a_curve_for_each_depth(axes):
    plots.curves(axes, ROWS, "rates")
    for (steps, values), expected in zip(
        lines(axes), ([0.5, 0.75], [0.25, 0.5], [np.nan, 0.125]), strict=True
    ):
        np.testing.assert_array_equal(steps, [10, 30])
        np.testing.assert_array_equal(values, expected)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["depth 1", "depth 2", "depth 3"]
    assert len({tuple(line.get_color()) for line in axes.lines}) == 3


@pytest.mark.parametrize("num,marker", [(29, "o"), (30, "None")])
def test_few_points_are_seen_as_points(axes, num, marker):
    rows = [{"step": i, "loss": 1.0} for i in range(num)]
    plots.curves(axes, rows, "loss")
    assert axes.lines[0].get_marker() == marker


def test_what_is_not_recorded_is_not_drawn(axes):
    plots.curves(axes, ROWS, "top1")
    plots.curves(axes, [{"step": 1, "top1": None}], "top1")
    assert not axes.lines


def test_the_file(tmp_path, monkeypatch):
    rows = [
        {"step": 10 * i, "drafter/loss": 3.0 - i, "drafter/top1_acc": [0.5, 0.4]}
        | ({"eval/coupled_rate_by_depth": [0.6, 0.3]} if i % 2 else {})
        for i in range(1, 4)
    ]
    test_plots.write(tmp_path, rows)
    drawn = []
    save = plots.style.save
    monkeypatch.setattr(
        plots.style,
        "save",
        lambda fig, path: drawn.append(fig) or save(fig, path),
    )
    path = plots.draw_training(str(tmp_path))
    assert path == tmp_path / "plots" / "drafter.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [axes.get_title(loc="left").split(":")[0] for axes in panels] == [
        "training loss",
        "both laws' likeliest token agree, by step unrolled",
        "held out",
        "held out",
    ]
    assert [len(axes.lines) for axes in panels] == [1, 2, 2, 0]
    np.testing.assert_array_equal(panels[0].lines[0].get_ydata(), [2, 1, 0])
    np.testing.assert_array_equal(panels[2].lines[0].get_xdata(), [10, 30])
    # Shares lie between 0 and 1; the loss finds its own scale.
    assert [axes.get_ylim() == (0, 1) for axes in panels] == [False, True, True, True]
