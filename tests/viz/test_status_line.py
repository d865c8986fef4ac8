"""A command's stages: one changing line on a terminal, plain lines elsewhere."""

import io

from tlt_jax.viz import status_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def show(file):
    clock = Clock()
    with status_line.StatusLine(file, clock) as line:
        line.stage("loading")
        line.stage("loading")
        clock.now = 1.0
        line.within(1, 4, "7 tokens")
        clock.now = 40.0
        line.within(2, 4)
        line.note("2 rewards failed")
        line.stage("writing")
    return file.getvalue()


def test_elsewhere_each_stage_is_a_line_and_a_long_one_says_how_far_it_is():
    assert show(io.StringIO()) == (
        "loading ...\nloading 2/4, 40 s\n2 rewards failed\nwriting ...\n"
    )


def test_on_a_terminal_a_line_changes_and_is_gone_in_the_end():
    erase = "\r\x1b[K"
    assert show(Terminal()) == (
        f"{erase}loading ...{erase}loading 1/4, 7 tokens, 1 s{erase}loading 2/4, 40 s"
        f"{erase}2 rewards failed\n{erase}writing ...{erase}"
    )
