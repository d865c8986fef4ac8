"""Plots are drawn from any record, complete or not, and by the printed command."""

import functools
import math
import os

import numpy as np
import pytest

from tlt_jax.viz import plots
from tlt_jax.workdir import metrics


def make_row(step: int, **more):
    return {
        "step": step,
        "reward/mean": step / 10,
        "reward/std": 0.3,
        "length/p50": 40 + step,
        "length/p95": 90 + step,
        "length/max": 128,
        "policy/entropy": 1.0,
        "policy/grad_norm": math.nan if step == 1 else 1.0,
        "time/step_s": 10.0 if step else 90.0,
        "time/rollout_s": 6.0,
        "time/update_s": 3.0,
        "time/compile_s": 0.0 if step else 80.0,
    } | more


def write(workdir, rows):
    with metrics.MetricsWriter(workdir) as writer:
        for row in rows:
            writer.write(row)


@pytest.mark.parametrize("num_steps", [1, 3, 40])
def test_all_plots_of_a_run(tmp_path, num_steps):
    write(
        tmp_path,
        [make_row(s, **{"specdec/accept_length": 2.0}) for s in range(num_steps)],
    )
    written = plots.draw_all(tmp_path)
    assert [path.name for path in written] == [
        "reward.png",
        "lengths.png",
        "time_split.png",
        "accept_length.png",
        "policy.png",
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path / "plots")) == sorted(p.name for p in written)


def test_a_run_that_died_before_its_last_plot_is_drawn(tmp_path, monkeypatch):
    drawn: list = []
    monkeypatch.setattr(plots, "draw_all", drawn.append)
    write(tmp_path, [make_row(0)])
    plots.complete(tmp_path)
    assert drawn == [tmp_path]
    # It died while it drew: there is the one of some steps before.
    (tmp_path / "plots").mkdir()
    last = tmp_path / "plots" / "policy.png"
    last.touch()
    os.utime(tmp_path / metrics.FILE, ns=(0, 100))
    for at, num in ((99, 2), (100, 2), (101, 2)):
        os.utime(last, ns=(0, at))
        plots.complete(tmp_path)
        assert drawn == [tmp_path] * num
    # Whatever else is drawn, that is the last.
    for draw in (plots.timeline.draw, plots.drafter_training):
        owner = plots.timeline if draw.__name__ == "draw" else plots
        named = functools.wraps(draw)(lambda told: plots.reward([make_row(0)]))
        monkeypatch.setattr(owner, draw.__name__, named)
    names = list(plots.figures(tmp_path))
    assert {"timeline", "drafter_training"} < set(names) and names[-1] == "policy"


def test_chances_are_drawn_against_what_came_of_them():
    tenths = [0, 4, *[0] * 7, 6]
    row = {
        "specdec/chance_tried": tenths,
        "specdec/chance_sum": [0, 0.5, *[0] * 7, 5.7],
        "specdec/chance_true": [0, 1, *[0] * 7, 6],
    }
    drawn = plots.reliability([row, row, {"step": 3}])
    _, line = drawn.axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[0.125, 0.25], [0.95, 1.0]])
    # Nothing is drawn of records that hold something else.
    huge = {name: [10**30, *counts[1:]] for name, counts in row.items()}
    assert plots.reliability([huge]).axes[0].collections
    row["specdec/chance_sum"] = [1.0]
    assert plots.reliability([row]) is None
    assert plots.reliability([{"specdec/chance_tried": "many"}]) is None


def test_what_was_accepted_is_drawn_by_rank():
    verified, accepted = [0, 8, 8, 16, *[0] * 16], [0, 6, 2, 2, *[0] * 16]
    row = {"specdec/rank_verified": verified, "specdec/rank_accepted": accepted}
    axes = plots.ranks([row, row, {"step": 3}]).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [0, 0.6, 0.2, 0.2])
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.75], [2, 0.25], [3, 0.125]])
    told = [label.get_text() for label in axes.get_xticklabels()]
    assert told == ["0.25", "0.5", "0.75", "1"]
    # Nothing is drawn of records that hold something else.
    for others in ([1.0], "many", [0] * 20):
        row["specdec/rank_verified"] = others
        assert plots.ranks([row]) is None


def test_what_is_not_recorded_is_not_drawn(tmp_path):
    write(tmp_path, [{"step": 0, "reward/mean": 1.0}])
    assert [path.name for path in plots.draw_all(tmp_path)] == ["reward.png"]


def test_without_speculation_there_is_no_accept_length():
    rows = [make_row(s, **{"specdec/accept_length": 1.0}) for s in range(3)]
    assert plots.accept_length(rows) is None
    # Where nothing was accepted it is a finding.
    rows[1]["specdec/num_accepted"] = [4, 0]
    assert plots.accept_length(rows) is not None


def test_reward_shows_what_was_recorded():
    rows = [make_row(s, **{"eval/pass@4": 0.5} if s == 2 else {}) for s in range(20)]
    (axes,) = plots.reward(rows).axes
    curves = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(curves["mean"].get_ydata(), np.arange(20) / 10)
    last = curves["mean of the last 4 steps"].get_ydata()[-1]
    assert last == pytest.approx((1.6 + 1.7 + 1.8 + 1.9) / 4)
    assert list(curves["held out, pass@4"].get_xdata()) == [2]
    assert len(curves) == 3
    rows = [row | {"reward/exact": 0.5, "reward/num_failed": 1} for row in rows]
    (axes,) = plots.reward(rows).axes
    curves = {line.get_label(): line for line in axes.lines}
    assert len(curves) == 4 and set(curves["exact"].get_ydata()) == {0.5}


def test_time_split_stacks_to_the_step_and_names_the_rest():
    (axes,) = plots.time_split([make_row(s) for s in range(3)]).axes
    spans = [(p.get_y(), p.get_height()) for p in axes.patches if p.get_x() > 0]
    # Steps 1 and 2: rollout, then update on top of it, no compilation, the rest.
    expected = [(0, 6), (0, 6), (6, 3), (6, 3), (9, 0), (9, 0), (9, 1), (9, 1)]
    np.testing.assert_allclose(spans, expected)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["rollout", "update", "compilation", "other"]


def test_time_split_leaves_out_what_was_spent_beside_the_step():
    (axes,) = plots.time_split([make_row(0) | {"time/wait_s": 2.0}]).axes
    spans = [(p.get_y(), p.get_height()) for p in axes.patches]
    assert (0, 2) in spans and 6 not in [height for _, height in spans]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["waiting for the rollout", "update"]


def test_one_step_of_compilation_does_not_squeeze_the_others():
    (axes,) = plots.time_split([make_row(s) for s in range(40)]).axes
    assert axes.get_ylim()[1] < 15
    (note,) = axes.texts
    assert note.get_text() == "1 step beyond the scale (highest 90 s)"


def test_smooth_is_the_mean_of_the_last_values():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(plots.smooth(values, 2), [1, 2, 4, 6])
    np.testing.assert_allclose(plots.smooth(values, 9), [1, 2, 3, 4])
