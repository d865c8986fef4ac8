"""The look of plots: integer steps, single steps, sizes, files replaced whole."""

import os
import struct

import pytest

from tlt_jax.viz import style


def png_size(content):
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_a_panel_over_steps():
    fig, axes = style.figure("A title", "nats")
    axes.plot([3, 4, 5], [1, 2, 9], label="curve")
    assert style.finish(fig, axes) is fig
    assert axes.get_title(loc="left") == "A title"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("RL step", "nats")
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["curve"]
    # The legend stands beside the panel, not on the curve.
    assert axes.get_legend().get_bbox_to_anchor().x0 == pytest.approx(axes.bbox.x1)
    visible = {name: spine.get_visible() for name, spine in axes.spines.items()}
    assert visible == {"left": True, "bottom": True, "top": False, "right": False}


@pytest.mark.parametrize("steps,limits", [([7], (6.5, 7.5)), ([7, 8, 10], None)])
def test_a_single_step_stands_in_the_middle(steps, limits):
    _, axes = style.figure("t", "y")
    axes.plot(steps, steps)
    before = axes.get_xlim()
    style.style(axes)
    assert axes.get_xlim() == pytest.approx(before if limits is None else limits)


def test_a_picture_is_a_png_of_its_resolution():
    fig, axes = style.figure("t", "y")
    axes.plot([1, 2])
    small, large = style.picture(fig), style.picture(fig, dpi=160)
    assert png_size(small.png) == (600, 336)  # 7.5 by 4.2 inches.
    assert png_size(large.png) == (1200, 672)
    assert small._repr_png_() is small.png


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    path.write_bytes(b"the old picture")
    fig, axes = style.figure("t", "y")
    axes.plot([1, 2])
    seen = []
    replace = os.replace

    def look(source, target):
        # Complete beside the old one, which is still there.
        seen.append((png_size(source.read_bytes()), path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(style.os, "replace", look)
    style.save(fig, path)
    assert seen == [((975, 546), b"the old picture")]
    assert png_size(path.read_bytes()) == (975, 546)
    assert os.listdir(tmp_path) == ["plot.png"]

    def fail(part, **_):
        part.write_bytes(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(fig, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        style.save(fig, path)
    assert png_size(path.read_bytes()) == (975, 546)
    assert os.listdir(tmp_path) == ["plot.png"]
