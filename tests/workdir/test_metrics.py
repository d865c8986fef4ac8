"""The record of a run is complete, legal JSON, and resumes."""

import errno
import json
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tlt_jax.workdir import metrics


def row(step, **more):
    return {"step": step, "reward/mean": step / 8, "time/step_s": 1.5} | more


def write(workdir, steps, first_step=0):
    with metrics.MetricsWriter(workdir, first_step) as writer:
        for step in steps:
            writer.write(row(step))


def test_rows_come_back(tmp_path):
    values = {
        "step": 0,
        "reward/mean": jnp.float32(0.25),
        "reward/std": np.float64(0.5),
        "policy/entropy": jnp.bfloat16(2.0),
        "length/max": np.int32(7),
        "specdec/accept_rate_by_depth": np.array([0.5, 0.25], np.float32),
        "specdec/strategy": "off",
        "rollout/tokens_digest": "ab12",
        "eval/pass@8": 0.5,
        "drafter/loss": None,
    }
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(values)
        writer.write(row(5))
    expected = values | {
        "reward/mean": 0.25,
        "specdec/accept_rate_by_depth": [0.5, 0.25],
    }
    assert metrics.read(tmp_path) == [expected, row(5)]
    assert type(metrics.read(tmp_path)[0]["length/max"]) is int


def test_names_of_the_design_are_all_there():
    assert len(metrics.NAMES) == 34
    assert {"step", "mismatch/logprob_max_abs", "time/compile_s"} <= metrics.NAMES


def test_non_finite_numbers_are_legal_json(tmp_path):
    numbers = [math.nan, math.inf, -math.inf]
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write({"step": 0, "policy/loss": math.nan, "policy/x": numbers})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / metrics.FILE).read_text()
    json.loads(line, parse_constant=refuse)
    (read,) = metrics.read(tmp_path)
    assert math.isnan(read["policy/loss"]) and math.isnan(read["policy/x"][0])
    assert read["policy/x"][1:] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "bad", ["reward", "Reward/mean", "reward/", "/mean", "reward mean", "a/b/c"]
)
def test_bad_names_are_refused(tmp_path, bad):
    with metrics.MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="use group/name"):
            writer.write({"step": 0, bad: 1})
        with pytest.raises(ValueError, match="give a number"):
            writer.write({"step": 0, "a/b": np.zeros((2, 2))})
    assert metrics.read(tmp_path) == []


def test_step_must_advance(tmp_path):
    write(tmp_path, [0, 1])
    with metrics.MetricsWriter(tmp_path, 2) as writer:
        for step in (1, None, 1.0):
            with pytest.raises(ValueError, match="does not follow 1"):
                writer.write({"step": step})


def test_resume_drops_later_rows_and_says_so(tmp_path, caplog):
    write(tmp_path, range(6))
    logging.use_absl_handler()
    with caplog.at_level("WARNING", logger="absl"):
        write(tmp_path, [3, 4], first_step=3)
    assert [r["step"] for r in metrics.read(tmp_path)] == [0, 1, 2, 3, 4]
    assert "dropped 3 rows from step 3 on" in caplog.text


def test_half_a_line_is_not_read_and_is_repaired(tmp_path, caplog):
    write(tmp_path, range(3))
    path = tmp_path / metrics.FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert [r["step"] for r in metrics.read(tmp_path)] == [0, 1]
    with caplog.at_level("WARNING", logger="absl"):
        write(tmp_path, [2], first_step=2)
    assert [r["step"] for r in metrics.read(tmp_path)] == [0, 1, 2]
    assert "half a line" in caplog.text


def test_killed_writer_loses_no_row_that_was_written(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from tlt_jax.workdir import metrics\n"
        "writer = metrics.MetricsWriter(sys.argv[1])\n"
        "for step in range(3): writer.write({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60)
    assert metrics.read(tmp_path) == [{"step": 0}, {"step": 1}, {"step": 2}]
    # The dead process holds no lock.
    write(tmp_path, [3], first_step=3)


def test_damage_in_the_middle_is_named(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / metrics.FILE
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b'{"st', *lines[2:]]))
    with pytest.raises(metrics.MetricsError, match="line 2 is damaged"):
        metrics.read(tmp_path)
    with pytest.raises(metrics.MetricsError, match="line 2 is damaged"):
        metrics.MetricsWriter(tmp_path)
    with pytest.raises(metrics.MetricsError, match="give the --workdir of a run"):
        metrics.read(tmp_path / "other")


def test_second_writer_is_refused(tmp_path):
    with metrics.MetricsWriter(tmp_path):
        with pytest.raises(metrics.MetricsError, match="another process writes"):
            metrics.MetricsWriter(tmp_path)


def test_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    real = os.write

    def full(file, data):
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[: len(data) - 20])

    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(row(0))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(metrics.MetricsError, match=r"No space left.*make room"):
            writer.write(row(1))
        monkeypatch.undo()
        assert (tmp_path / metrics.FILE).read_bytes().count(b"\n") == 1
        writer.write(row(1))
    assert metrics.read(tmp_path) == [row(0), row(1)]
