"""The death campaign: a few deaths, and that it finds whom it is to kill."""

import os
import subprocess
import sys

import pytest

from tests import deaths


def test_the_processes_of_one_run_are_found_and_no_others(tmp_path):
    def start(index, directory):
        words = [sys.executable, "-c", "import time; time.sleep(60)", "tlt_jax.main"]
        variables = os.environ | {"TLT_JAX_PROCESS": str(index)}
        return subprocess.Popen([*words, f"--workdir={directory}"], env=variables)

    started = [start(0, tmp_path), start(1, tmp_path), start(1, tmp_path / "other")]
    expected = {"process 0": started[0].pid, "process 1": started[1].pid}
    # It takes a moment until they are what they were started as.
    while deaths.members(tmp_path) != expected:
        assert all(one.poll() is None for one in started)
    for one in started:
        one.kill()
        one.wait()
    assert deaths.members(tmp_path) == {}


@pytest.mark.slow
def test_a_few_deaths_change_nothing():
    ended = subprocess.run(
        [sys.executable, "-m", "tests.deaths", "--kills=4"],
        cwd=deaths.ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].endswith("| yes |")
