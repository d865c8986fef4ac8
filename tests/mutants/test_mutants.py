"""The mutants can be made, and with patience each is seen."""

import collections
import os
import subprocess
import sys

import pytest

from tests.mutants import catalogue, runner


def test_every_edit_can_be_made():
    """What a change of the code made stale is mended with it."""
    assert [m.problem() for m in catalogue.MUTANTS if m.problem()] == []


def test_there_are_enough_in_every_part():
    assert len(set(catalogue.MUTANTS)) == len(catalogue.MUTANTS) >= 120
    parts = collections.Counter(m.file.split("/")[0] for m in catalogue.MUTANTS)
    assert set(parts) >= {"specdec", "models", "rl", "cpu_kernels", "pallas_kernels"}


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_none_survives():
    # In a process of its own: children are forked from it.
    root = runner.ROOT
    ran = subprocess.run(
        [sys.executable, "-m", "tests.mutants"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
