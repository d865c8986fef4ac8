"""Pictures of one step made up by hand; `test_trace` draws steps that were decoded."""

import types

import numpy as np
import pytest
from matplotlib import colors

from tlt_jax.viz import style, trace, trees

# The root 5 has the children 1, 2, 3; of 1 the children 4, 6; one node is not there.
PARENTS = [0, 0, 0, 0, 1, 1, 4, 0]
VALID = np.array([True] * 7 + [False])
V = 8


def name(token):
    return f"<{token}>"


def made_step():
    """A path of the root, its first child and of that the second is accepted."""
    parents = np.array(PARENTS)
    depths = np.array([0, 1, 1, 1, 2, 2, 3, 0])
    sees = np.eye(8, dtype=bool)
    for node in range(1, 7):
        sees[node] |= sees[parents[node]]
    probs = np.full((8, V), 0.01)
    probs[:, 3], probs[:, 1], probs[:, 6] = 0.5, 0.25, 0.2
    noise = np.zeros((4, V))
    # At the root the noise lifts the drafted 1 above 3, which is likelier.
    noise[0, 1], noise[1, 3] = 2.0, 1.0
    return trace.Step(
        text=np.arange(12) % 5,
        tokens=np.array([5, 1, 2, 3, 4, 6, 7, 0]),
        parents=parents,
        depths=depths,
        valid=VALID,
        sees=sees,
        logprobs=np.log(probs),
        noise=noise,
        drawn=np.array([1, 6, 0, 0, 0, 3, 0, 0]),
        path=np.array([0, 1, 5]),
        emitted=np.array([1, 6, 3]),
    )


@pytest.fixture
def step():
    return made_step()


def hexes(patches):
    return [colors.to_hex(patch.get_facecolor()).upper() for patch in patches]


def test_names_show_blanks_and_what_is_no_text():
    texts = {0: b"a b\n", 1: b"\xff", 2: "é".encode()}
    named = trees.names_of(types.SimpleNamespace(token_bytes=texts.get))
    assert [named(token) for token in texts] == ["a␣b↵", "�", "é"]


def test_leaves_stand_side_by_side_and_parents_above_them(step):
    (axes,) = trees.tree(step, name).axes
    told = [t for t in axes.texts if not t.get_text().startswith("draws")]
    assert [(t.get_text(), *t.get_position()) for t in told] == [
        ("<5>", (0.5 + 3.0) / 2, 0.0),
        ("<1>", 0.5, 1.0),
        ("<2>", 2.0, 1.0),
        ("<3>", 3.0, 1.0),
        ("<4>", 0.0, 2.0),
        ("<6>", 1.0, 2.0),
        ("<7>", 0.0, 3.0),
        # Behind the path, beside what stands at its depth.
        ("<3>", 1.0, 3.0),
    ]
    boxes = hexes(axes.patches)
    # In order of nodes: root, accepted, refused twice, refused, accepted, refused, and
    # what the target drew.
    green, pale = style.GREEN, style.PALE
    assert boxes == [style.SKY, green, pale, pale, pale, green, pale, style.ORANGE]
    draws = [t.get_text() for t in axes.texts if t.get_text().startswith("draws")]
    assert draws == [f"draws <{t}>" for t in (1, 6, 0, 0, 0, 3, 0)]
    assert axes.figure.get_suptitle() == (
        "A pass of the target reads 7 nodes, accepts 2, and adds 3 to the text"
    )
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "text's end",
        "depth 1",
        "depth 2",
        "depth 3",
    ]


def test_a_path_that_ends_at_the_root_draws_below_it(step):
    fields = vars(step) | {"path": np.array([0]), "emitted": np.array([3])}
    (axes,) = trees.tree(trace.Step(**fields), name).axes
    # Beside the three children.
    assert axes.texts[-1].get_position() == (4.0, 1.0)
    assert hexes(axes.patches).count(style.GREEN) == 0


def test_the_mask_is_of_the_text_and_of_ancestors(step):
    (axes,) = trees.mask(step, name).axes
    shades = axes.collections[0].get_array().reshape(7, 8 + 7)
    # Of eleven cached tokens the last eight.
    assert (shades[:, :8] == 1).all()
    np.testing.assert_array_equal(
        shades[:, 8:],
        [
            [3, 0, 0, 0, 0, 0, 0],
            [3, 3, 0, 0, 0, 0, 0],
            [2, 0, 2, 0, 0, 0, 0],
            [2, 0, 0, 2, 0, 0, 0],
            [2, 2, 0, 0, 2, 0, 0],
            [3, 3, 0, 0, 0, 3, 0],
            [2, 2, 0, 0, 2, 0, 2],
        ],
    )
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert labels == [name(t) for t in (3, 4, 0, 1, 2, 3, 4, 0, 5, 1, 2, 3, 4, 6, 7)]
    assert [t.get_text() for t in axes.get_yticklabels()][5] == "<6>  depth 2"
    assert axes.get_xlabel() == "…, cached text | nodes of the tree"


def test_a_draw_is_the_law_and_the_noise(step):
    law, scores = trees.draw_at(step, 0, name, num_shown=4).axes
    # The children 1, 2, 3 and of the others the likeliest, in order of the law.
    shown = [t.get_text() for t in scores.get_xticklabels()]
    assert shown == ["<3>", "<1>", "<6>", "<2>"]
    heights = [bar.get_height() for bar in law.patches]
    np.testing.assert_allclose(heights, [0.5, 0.25, 0.2, 0.01])
    tops = [bar.get_y() + bar.get_height() for bar in scores.patches]
    logs = np.log([0.5, 0.25, 0.2, 0.01]) + [0, 2, 0, 0]
    np.testing.assert_allclose(tops, logs)
    # 1 was drawn and drafted, 3 and 2 were drafted, 6 was neither.
    green, grey, pale = style.GREEN, style.GREY, style.PALE
    assert hexes(law.patches) == hexes(scores.patches) == [grey, green, pale, grey]
    assert scores.get_title(loc="left").endswith("the largest is drawn, '<1>'")
    # At the end of the path nothing had been drafted.
    law, scores = trees.draw_at(step, 5, name, num_shown=2).axes
    assert hexes(law.patches) == [style.ORANGE, pale]
    tops = [bar.get_y() + bar.get_height() for bar in scores.patches]
    np.testing.assert_allclose(tops, np.log([0.5, 0.25]))


def test_a_text_has_a_row_for_each_pass(step):
    other = vars(step) | {"path": np.array([0]), "emitted": np.array([2])}
    steps = [step, trace.Step(**other)]
    (axes,) = trees.text(steps, name).axes
    placed = {t.get_position(): t.get_text() for t in axes.texts}
    assert placed == {(0, 0): "<1>", (1, 0): "<6>", (2, 0): "<3>", (0, 1): "<2>"}
    green, orange = style.GREEN, style.ORANGE
    assert hexes(axes.patches) == [green, green, orange, orange]
    assert axes.get_title(loc="left") == (
        "4 tokens in 2 passes of the target, 2.00 a pass"
    )


def test_acceptance_by_position(step):
    refused = trace.Step(**vars(step) | {"path": np.array([0])})
    law, axes = trees.acceptance(
        {"good": [step, step, refused], "bad": [refused, refused, step]}, name
    ).axes
    np.testing.assert_allclose([bar.get_height() for bar in law.patches], [0.25] * 3)
    np.testing.assert_array_equal(axes.images[0].get_array(), [[2, 2, 0], [0, 0, 2]])
    assert [t.get_text() for t in axes.texts] == ["2", "2", "0", "0", "0", "2"]
    told = [t.get_text() for t in axes.get_yticklabels()]
    assert told == ["good: 2.33 a pass", "bad: 1.67 a pass"]


def test_rates_stand_side_by_side():
    (axes,) = trees.rates({"a": [0.5, 0.25, 0.1], "b": [0.75]}).axes
    bars = [(b.get_x() + b.get_width() / 2, b.get_height()) for b in axes.patches]
    expected = [(-0.2, 0.5), (0.8, 0.25), (1.8, 0.1), (0.2, 0.75)]
    np.testing.assert_allclose(bars, expected, atol=1e-9)
    assert [t.get_text() for t in axes.get_xticklabels()][2] == "depth 3"
