"""A run's directory: whose it is, what may change, what is written when disks fail."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny_runs
from tlt_jax import config, types
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import experience
from tlt_jax.settings import recipe, schema
from tlt_jax.workdir import directory as workdir
from tlt_jax.workdir import files, metrics


def claim(directory, **overrides):
    with workdir.claimed(directory, tiny_runs.config_of(**overrides)):
        return config.load(json.loads((directory / "config.json").read_text()))


@pytest.fixture
def begun(tmp_path):
    """The directory of a run that has taken a step."""
    claim(tmp_path)
    (tmp_path / metrics.FILE).write_text('{"step": 1}\n')
    return tmp_path


def test_the_first_run_writes_its_settings(tmp_path):
    run = tiny_runs.config_of(seed=4)
    assert claim(tmp_path / "a" / "b", seed=4) == run
    assert claim(tmp_path / "a" / "b", seed=4) == run
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        ".lock",
        "config.json",
        "config.yaml",
    ]


def test_the_settings_as_yaml_are_a_recipe_and_in_their_order(tmp_path):
    claim(tmp_path, seed=4)
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines()
    assert lines[:4] == ["seed: 4", "num_steps: 8", "precision: float32", "model:"]
    values = recipe.load(str(path), config.RunConfig)
    assert config.load(values) == tiny_runs.config_of(seed=4)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_steps": 99},
        {"log.progress": "plain"},
        {"checkpoint.every": 1},
        {"eval.every": 3},
        {"reward.workers": 1},
        {"reward.workers": 1, "reward.placement": "separate"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_decides_nothing_may_change(begun, changed):
    assert claim(begun, **changed) == tiny_runs.config_of(**changed)


def test_other_settings_are_refused_by_name(begun, tmp_path):
    with pytest.raises(schema.ConfigError) as raised:
        claim(tmp_path, **{"sampling.temperature": 0.5})
    assert str(raised.value) == (
        f"{tmp_path} holds a run with sampling.temperature=1.0, not 0.5: use another "
        "--workdir, or the same settings to resume."
    )
    with pytest.raises(schema.ConfigError, match=r"seed=0, not 1 \(and 2 more differ"):
        claim(tmp_path, seed=1, **{"cache.page_size": 8, "model.spec": "other"})
    assert claim(tmp_path) == tiny_runs.config_of()


def test_a_run_of_fewer_steps_is_refused_and_nothing_is_touched(begun, tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1}\n{"step": 7}\n')
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(schema.ConfigError) as raised:
        claim(tmp_path, num_steps=6)
    assert str(raised.value) == (
        f"num_steps=6, but the run in {tmp_path} has taken 7 steps: give "
        "--config.num_steps=7 or more, or use another --workdir."
    )
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    with pytest.raises(schema.ConfigError, match="num_steps=8, .* has taken 9 steps"):
        claim(tmp_path)
    # Of a complete run the description stays as it is.
    claim(tmp_path, num_steps=9, **{"log.progress": "plain"})
    assert (tmp_path / "config.json").read_bytes() == before
    assert len(metrics.read(tmp_path)) == 2


def test_a_start_that_failed_binds_nobody(tmp_path):
    claim(tmp_path, **{"model.spec": "mistyped"})
    (tmp_path / metrics.FILE).write_text("")
    run = tiny_runs.config_of(**{"model.spec": "right"})
    assert claim(tmp_path, **{"model.spec": "right"}) == run


@pytest.mark.parametrize("text", ["", "{", '{"sed": 1}', "[1]", "3"])
def test_a_damaged_description_is_named(begun, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(schema.ConfigError, match=r"config\.json cannot be read"):
        claim(tmp_path)


def test_another_process_in_the_directory_is_named(tmp_path):
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / ".lock").touch()
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(files.WorkdirError, match="another process works in"):
                claim(tmp_path)
            assert not (tmp_path / "config.json").exists()
        finally:
            other.kill()
    assert claim(tmp_path) == tiny_runs.config_of()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.WorkdirError, match=r"file.run could not be written"):
        claim(tmp_path / "file" / "run")
    with pytest.raises(files.WorkdirError, match=r"a file stands where .* --workdir"):
        claim(tmp_path / "file")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    claim(tmp_path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(files.WorkdirError) as raised:
        workdir.write_rollouts(tmp_path, 3, batch(), str)
    assert str(raised.value) == (
        f"{tmp_path}/rollouts/step_000003.jsonl could not be written (No space left on "
        "device): make room or give permission, then run the same command again; it "
        "resumes from the newest checkpoint."
    )
    with pytest.raises(files.WorkdirError, match=r"config\.json could not be writ"):
        claim(tmp_path)
    monkeypatch.undo()
    assert claim(tmp_path) == tiny_runs.config_of()


def batch():
    made = [
        types.Completion(
            7, np.array([5, 6], np.int32), np.zeros(2), "eos", np.array([False, True])
        ),
        types.Completion(8, np.array([9], np.int32), np.zeros(1), "length"),
    ]
    example = types.Example("sums/1", "1+1=", "2")
    prompt = prompts.Prompt(0, example, np.array([1], np.int32))
    return experience.Experience([prompt], made, np.array([[1.0, -0.5]]))


def test_completions_are_written_a_line_each(tmp_path):
    for _ in range(2):  # A step that is taken again is written again.
        workdir.write_rollouts(tmp_path, 12, batch(), lambda tokens: f"≈{len(tokens)}")
    # Written aside and renamed: who reads meanwhile reads the whole.
    assert os.listdir(tmp_path / "rollouts") == ["step_000012.jsonl"]
    text = (tmp_path / "rollouts" / "step_000012.jsonl").read_text("utf-8")
    assert "≈2" in text
    shared = {"example_id": "sums/1", "prompt": "1+1=", "answer": "2"}
    assert [json.loads(line) for line in text.splitlines()] == [
        shared
        | {
            "request_id": 7,
            "reward": 1.0,
            "num_tokens": 2,
            "finish_reason": "eos",
            "text": "≈2",
            "tokens": [5, 6],
            "drafted": [[1, 2]],
        },
        shared
        | {
            "request_id": 8,
            "reward": -0.5,
            "num_tokens": 1,
            "finish_reason": "length",
            "text": "≈1",
            "tokens": [9],
            "drafted": None,
        },
    ]


def test_runs_of_drafted_tokens():
    assert workdir._runs(np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)) == [
        [0, 2],
        [3, 4],
        [6, 8],
    ]
    assert workdir._runs(np.zeros(3, bool)) == []
