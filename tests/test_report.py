"""The command that writes a run's report: where to, and what is wrong in one line."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from tests.viz import test_plots
from tlt_jax import report

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def workdir(tmp_path):
    directory = tmp_path / "run"
    test_plots.write(directory, [test_plots.make_row(s) for s in range(2)])
    return directory


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command with these flags; return its status and what it says."""

    def run(*more, **flags):
        values = types.SimpleNamespace(**{"out": None, "num_answers": 8} | flags)
        monkeypatch.setattr(report, "flags", types.SimpleNamespace(FLAGS=values))
        try:
            report._main(["report", *more])
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_the_command_line(workdir):
    out = workdir.parent / "page.html"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tlt_jax.report", f"--workdir={workdir}"),
            *(f"--out={out}", "--num_answers=0"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert "<title>tlt_jax: run<" in out.read_text("utf-8")
    assert sorted(os.listdir(workdir)) == ["metrics.jsonl"]


def test_by_default_it_lies_in_the_workdir(call, workdir, monkeypatch):
    seen = []
    monkeypatch.setattr(
        report.report, "write", lambda *given: seen.append(given) or "written"
    )
    assert call(workdir=str(workdir), num_answers=3) == (0, "written\n", "")
    assert seen == [(str(workdir), None, 3)]


def test_what_is_wrong_is_one_line(call, workdir):
    status, out, err = call("more", workdir=str(workdir))
    assert (status, out) == (2, "")
    assert err == "error: unexpected argument 'more': every setting is a --flag.\n"
    place = workdir / "no" / "page.html"
    status, out, err = call(workdir=str(workdir), out=str(place))
    assert (status, out) == (2, "")
    assert err.startswith(f"error: --out={workdir}/no/")
    assert err.endswith(
        " could not be written (No such file or directory): name a file in a directory "
        "that is there and may be written. (--verbosity=1 shows where)\n"
    )
    status, out, err = call(workdir=str(workdir / "nothing"))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and "does not exist: give" in err
