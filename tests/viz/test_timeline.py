"""The workers' timeline: what is read, what is summed, what is drawn."""

import json

import numpy as np
import pytest
from matplotlib import colors

from tests.viz import test_plots
from tlt_jax.viz import plots, style, timeline


def record(step, begin=100.0):
    """Worker 0 decodes for 8 s; worker 1 is done after 3 and trains from 4 to 7.5."""
    busy = [["busy", begin, begin + 8.0]]
    mixed = [
        ["busy", begin, begin + 3.0],
        ["idle", begin + 3.0, begin + 4.0],
        ["training", begin + 4.0, begin + 7.5],
        ["idle", begin + 7.5, begin + 8.0],
    ]
    return {
        "step": step,
        "workers": [
            {"worker": 0, "intervals": busy},
            {"worker": 1, "intervals": mixed},
        ],
    }


def write(workdir, records, tail=""):
    lines = [json.dumps(r) + "\n" for r in records]
    (workdir / timeline.FILE).write_text("".join(lines) + tail)


def test_read_keeps_the_last_of_a_step_and_complete_lines(tmp_path):
    assert timeline.read(tmp_path) == []
    write(tmp_path, [record(0), record(1), record(2)])
    with open(tmp_path / timeline.FILE, "a") as file:
        # Resumed from step 1; killed while writing step 3.
        file.write(json.dumps(record(1, begin=900.0)) + "\n" + '{"step": 3, "wor')
    found = timeline.read(tmp_path)
    assert found == [record(0), record(1, begin=900.0), record(2)]
    (tmp_path / timeline.FILE).write_text('{"step": \n' + json.dumps(record(5)) + "\n")
    assert timeline.read(tmp_path) == [record(5)]


def test_seconds_and_share():
    spent = timeline.seconds(record(3))
    assert spent == {"busy": 11.0, "compiling": 0.0, "training": 3.5, "idle": 1.5}
    assert timeline.trained_frac(spent) == pytest.approx(0.7)
    assert timeline.trained_frac({"busy": 2.0, "training": 0.0, "idle": 0.0}) is None


def spans(axes):
    """`(row, first second, last second, color)` of every bar of a step's panel."""
    found = set()
    for bars in axes.collections:
        (path,) = bars.get_paths()
        (left, low), (right, high) = path.get_extents().get_points()
        color = colors.to_hex(bars.get_facecolor()[0]).upper()
        found.add((round((low + high) / 2), left, right, color))
    return found


def test_step_shows_every_interval_from_the_rollout_s_begin():
    (axes,) = timeline.draw([record(7, begin=1000.0)]).axes
    blue, green, pale = style.BLUE, style.GREEN, style.PALE
    assert spans(axes) == {
        (0, 0.0, 8.0, blue),
        (1, 0.0, 3.0, blue),
        (1, 3.0, 4.0, pale),
        (1, 4.0, 7.5, green),
        (1, 7.5, 8.0, pale),
    }
    assert axes.get_title("left") == "step 7: 70% of the free time trained"
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["worker 0", "worker 1"]
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["decoding", "training the drafter", "idle"]


def test_compiling_has_a_colour_of_its_own():
    made = record(1)
    made["workers"][0]["intervals"].insert(0, ["compiling", 95.0, 100.0])
    (axes,) = timeline.draw([made]).axes
    assert (0, 0.0, 5.0, style.RED) in spans(axes)
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["decoding", "compiling", "training the drafter", "idle"]


def test_one_worker_that_only_decodes_has_no_picture():
    made = [["compiling", 0.0, 5.0], ["busy", 5.0, 9.0]]
    one = {"step": 1, "workers": [{"worker": 0, "intervals": made}]}
    assert timeline.draw([one]) is None
    made.append(["idle", 9.0, 9.5])
    (axes,) = timeline.draw([one]).axes
    # Where nobody trains nothing is said of it.
    assert axes.get_title("left") == "step 1"


def test_many_steps_have_shares_and_three_examples():
    drawn = timeline.draw([record(step) for step in range(11)])
    shares, *steps = drawn.axes
    assert [axes.get_title("left").split(":")[0] for axes in steps] == [
        "step 0",
        "step 5",
        "step 10",
    ]
    at_step_0 = [(p.get_y(), p.get_height()) for p in shares.patches[::11]]
    np.testing.assert_allclose(
        at_step_0, [(0, 11 / 16), (11 / 16, 3.5 / 16), (14.5 / 16, 1.5 / 16)]
    )


def test_nothing_is_drawn_of_nothing():
    assert timeline.draw([]) is None
    assert timeline.draw([{"step": 0, "workers": []}]) is None


def test_run_s_plots(tmp_path):
    rows = [
        test_plots.make_row(
            s,
            **{"drafter/loss": 2.0 - s, "drafter/top1_acc": [0.5, 0.25][: 1 + s]},
        )
        for s in range(2)
    ]
    test_plots.write(tmp_path, rows)
    names = [path.name for path in plots.draw_all(tmp_path)]
    assert "drafter_training.png" in names and "timeline.png" not in names
    write(tmp_path, [record(0), record(1)])
    written = plots.draw_all(tmp_path)
    # The last is that of every run, see `plots.complete`.
    assert [written[0].name, written[-1].name] == ["timeline.png", "policy.png"]
    assert written[0].read_bytes().startswith(b"\x89PNG")


def test_drafter_in_a_run():
    rows = [
        {"step": 0, "drafter/top1_acc": 0.5},
        {"step": 1, "drafter/top1_acc": [0.6, 0.4], "specdec/accept_length": 2.0},
        {"step": 2, "drafter/top1_acc": None},
    ]
    panels = plots.drafter_training(rows).axes
    assert [axes.get_title("left") for axes in panels] == [
        "tokens per verification",
        "drafter's likeliest token is the target's",
    ]
    first, second = (line.get_ydata() for line in panels[1].lines)
    np.testing.assert_array_equal(first, [0.5, 0.6])
    np.testing.assert_array_equal(second, [np.nan, 0.4])
    assert plots.drafter_training([{"step": 0, "specdec/accept_length": 2.0}]) is None
