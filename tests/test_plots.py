"""The command that draws a run's plots again."""

import pathlib
import subprocess
import sys

from tests.viz import test_plots

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_command(tmp_path):
    test_plots.write(tmp_path, [test_plots.make_row(0)])
    result = subprocess.run(
        [sys.executable, "-m", "tlt_jax.plots", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    # What was written is named, a file a line.
    names = ["reward", "lengths", "time_split", "policy"]
    written = [tmp_path / "plots" / f"{name}.png" for name in names]
    assert result.stdout.split() == list(map(str, written))
    assert all(path.is_file() for path in written)
