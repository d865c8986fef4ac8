"""The display says what matters, on a terminal and in a log file."""

import io
import types

import rich.console

from tlt_jax.workdir import progress

ROW = {
    "step": 3,
    "reward/mean": 0.40625,
    "reward/std": 0.25,
    "length/mean": 61.4,
    "length/p95": 120.0,
    "length/max": 128,
    "rollout/tokens_per_s": 1234.5,
    "time/step_s": 10.0,
    "time/rollout_s": 6.0,
    "time/update_s": 3.9,
    "time/reward_s": 0.01,
    "time/compile_s": None,
}


def console(terminal: bool) -> rich.console.Console:
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=110, highlight=False
    )


def test_one_line_per_step():
    text = progress.line(ROW, 4, 10, remaining_s=60.0)
    assert text == (
        "step  4/10 | reward 0.406 ± 0.25 | length 61/120/128 | tok/s 1,234 | "
        "time 10 s | of it rollout 60%, update 39% | 60 s left"
    )
    assert progress.line({"step": 9}, 10, 10, 0.0) == "step 10/10"
    # A rollout beside the step before is no part of this one; waiting for it is.
    text = progress.line(ROW | {"time/wait_s": 2.0}, 4, 10)
    assert text.endswith("time 10 s | of it wait 20%, update 39%")


def test_accept_lengths_of_a_chain_rule_are_said_to_be():
    row = {"specdec/num_accepted": [2, 1], "specdec/accept_length": 1.5}
    for more, told in (
        ({}, "1.50"),
        ({"specdec/rule": "keyed"}, "1.50"),
        ({"specdec/rule": "block"}, "1.50 (block)"),
    ):
        assert progress.line(row | more, 1, 1) == f"step 1/1 | accept {told}"


def test_durations():
    times = [0, 7.26, 42.4, 99.9, 125, 3599, 11520]
    assert [progress.duration(t) for t in times] == [
        "0.0 s",
        "7.3 s",
        "42 s",
        "100 s",
        "2 m 05 s",
        "59 m 59 s",
        "3 h 12 m",
    ]


def test_remaining_time_leaves_compilation_out():
    with progress.Progress(10, mode="off") as shown:
        assert shown.remaining_s() is None
        shown.record({"step": 0, "time/step_s": 32.0, "time/compile_s": 30.0})
        shown.record({"step": 1, "time/step_s": 2.0})
        assert shown.remaining_s() == 16.0


def test_plain_output_is_lines_and_first_and_slow_stages_are_heard_of():
    now = [0.0]
    out = console(terminal=False)
    with progress.Progress(2, console=out, clock=lambda: now[0]) as shown:
        shown.stage("loading")
        shown.stage("rollout")
        for done in range(4):
            now[0] += 20.0
            shown.within(done, 64, "900 tok/s")
        shown.stage("update")
        shown.stage("update")
        shown.record(ROW)
        shown.stage("rollout")
    lines = out.file.getvalue().splitlines()
    assert lines[:4] == [
        "  rollout ...",
        "  step 1: rollout 1/64  900 tok/s after 40 s",
        "  step 1: rollout 3/64  900 tok/s after 80 s",
        "  update ...",
    ]
    assert lines[4].startswith("step 1/2 | reward 0.406")
    assert len(lines) == 5


def test_live_display_shows_steps_and_stage():
    out = console(terminal=True)
    with progress.Progress(10, first_step=3, console=out) as shown:
        shown.record(ROW)
        shown.stage("rollout")
        shown.within(16, 64, "900 tok/s")
        with out.capture() as capture:
            out.print(shown._render())
    text = capture.get()
    for part in ("step 4/10", "60 s left", "rollout", "16/64", "0.406 ± 0.25"):
        assert part in text


TLT_ROW = ROW | {
    "specdec/num_accepted": [10, 9],
    "specdec/accept_length": 1.9,
    "drafter/version": 12,
    "workers/idle_s": 4.0,
    "workers/trained_s": 3.0,
    "workers/idle_frac": 0.25,
}


def test_speculation_and_workers_have_cells_where_there_are_any():
    text = progress.line(TLT_ROW, 4, 10)
    assert "| accept 1.90 | drafter v12 | idle (trained) 25% (75%) |" in text
    out = console(terminal=True)
    with progress.Progress(10, console=out) as shown:
        for row in (ROW, TLT_ROW | {"reward/mean": 0.5}):
            shown.record(row)
        shown.stage("rollout")
        shown.watch(lambda: progress.Workers(["busy", "training", "busy"], 12))
        with out.capture() as capture:
            out.print(shown._render())
        shown.watch(lambda: None)
        with out.capture() as later:
            out.print(shown._render())
    text = capture.get()
    for part in ("1.90", "v12", "25% (75%)", "▁█", "0.406 to 0.500", "●"):
        assert part in text, part
    assert "2 busy, 1 training, 0 idle, drafter v12" in text
    assert "busy" not in later.get()
    plain = progress.Workers(["lost", "idle"])
    assert str(plain) == "0 busy, 0 training, 1 idle, 1 lost"


def test_workers_that_wait_for_a_program_compile():
    def team_of(rolling=True):
        names = ((0, "busy"), (2, "busy"), (3, "idle"), (5, "busy"))
        workers = [types.SimpleNamespace(number=n, activity=a) for n, a in names]
        state = types.SimpleNamespace(rolling=rolling, workers=workers)
        # This process has workers 2 and 3; worker 1 was lost before.
        engines = [
            types.SimpleNamespace(
                pool=types.SimpleNamespace(stats=types.SimpleNamespace(num_waiting=1))
            )
            for _ in range(2)
        ]
        coordination = types.SimpleNamespace(state=state)
        return types.SimpleNamespace(
            coordination=coordination, engines=engines, first=2, drafter_version=4
        )

    seen = progress.seen(team_of())
    assert seen.activities == ("busy", "compiling", "idle", "busy")
    assert str(seen) == "2 busy, 1 compiling, 0 training, 1 idle, drafter v4"
    assert progress.seen(team_of(rolling=False)) is None


def test_curve_has_means_of_neighbours():
    assert progress.curve([0.0, 1.0, 2.0, 3.0], 4) == "▁▃▆█"
    assert progress.curve([0.0, 2.0, 4.0, 6.0], 2) == "▁█"
    assert progress.curve([1.0, float("nan"), 1.0], 8) == "▁▁"
    assert progress.curve([], 8) == ""


def test_off_prints_nothing():
    out = console(terminal=True)
    with progress.Progress(10, mode="off", console=out) as shown:
        shown.stage("rollout")
        shown.within(1, 2)
        shown.record(ROW)
        shown.note("x")
    assert out.file.getvalue() == ""
