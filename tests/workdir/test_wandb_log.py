"""The copy of a run's record at Weights & Biases: written offline, and missing."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests import tiny_runs
from tlt_jax.workdir import metrics, wandb_log

INSTALLED = importlib.util.find_spec("wandb") is not None
ROWS = (
    {"step": 1, "reward/mean": 0.25, "specdec/strategy": "off"},
    {"step": 2, "reward/mean": 0.5, "specdec/accept_rate_by_depth": [0.5, 0.25]},
)


def opened(directory, first_step=0, **overrides):
    run = tiny_runs.config_of(**{"log.wandb": "offline"} | overrides)
    return wandb_log.open_writer(directory, first_step, run)


@pytest.mark.skipif(INSTALLED, reason="wandb is installed")
def test_missing_package_is_named_with_its_remedy(tmp_path):
    with pytest.raises(metrics.MetricsError, match=r"not installed: pip install wandb"):
        opened(tmp_path)
    assert not list(tmp_path.iterdir())
    with opened(tmp_path, **{"log.wandb": "off"}) as writer:
        writer.write(ROWS[0])
    assert len(metrics.read(tmp_path)) == 1


def test_copies_get_the_numbers_of_rows_that_are_on_disk(tmp_path):
    class Copy:
        def __init__(self):
            self.rows, self.closed = [], 0

        def write(self, step, numbers):
            assert metrics.read(tmp_path)[-1]["step"] == step
            self.rows.append((step, numbers))

        def close(self):
            self.closed += 1

    copy = Copy()
    with metrics.MetricsWriter(tmp_path, 0, False, [copy]) as writer:
        for row in ROWS:
            writer.write(row)
        with pytest.raises(ValueError):
            writer.write({"step": 2})
    depths = {f"specdec/accept_rate_by_depth/{i}": x for i, x in enumerate((0.5, 0.25))}
    assert copy.rows == [(1, {"reward/mean": 0.25}), (2, {"reward/mean": 0.5} | depths)]
    assert copy.closed == 1


# In a process of its own: wandb starts another, and threads.
_RUN = """
import json, sys
from tests.workdir import test_wandb_log as here
for first, row in enumerate(here.ROWS):
    with here.opened(sys.argv[1], first + 1) as writer:
        writer.write(row)
"""
# What was written: records in a log of blocks as LevelDB has it, after 7 bytes.
_READ = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2 as pb
for path in sys.argv[1:]:
    data, at, whole = open(path, "rb").read(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):
            continue
        record, whole = pb.Record.FromString(whole), b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): i.value_json for i in items}
            print(json.dumps(row))
        if record.WhichOneof("record_type") == "run":
            print(json.dumps({"id": record.run.run_id}))
"""


@pytest.mark.skipif(not INSTALLED, reason="wandb is an extra that tests do not install")
def test_a_run_is_written_offline_and_goes_on(tmp_path):
    def python(code, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python(_RUN, tmp_path) == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = [json.loads(line) for line in python(_READ, *files).splitlines()]
    given = (tmp_path / wandb_log.ID_FILE).read_text().strip()
    assert {row["id"] for row in found if "id" in row} == {given}
    rewards = [row["reward/mean"] for row in found if "reward/mean" in row]
    assert rewards == ["0.25", "0.5"]
    assert len(metrics.read(tmp_path)) == 2
