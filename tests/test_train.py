"""Whole runs: what they write, that they are a function of their settings, and that
they go on after whatever stops them."""

import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from tests import tiny_runs
from tests.workdir import damage
from tlt_jax import train
from tlt_jax.rl import collector, evaluator
from tlt_jax.runtime import failures, stopping
from tlt_jax.settings import schema
from tlt_jax.workdir import checkpoint, files, metrics
from tlt_jax.workdir import directory as workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
ODD = tiny_runs.ODD
decisive, policy, values = tiny_runs.decisive, tiny_runs.policy, tiny_runs.values
settings, start = tiny_runs.settings, tiny_runs.start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything on, from a model that it makes itself."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run = tiny_runs.config_of(**{"log.tensorboard": True})
    assert train.train(run, directory)["step"] == run.num_steps
    return directory


@pytest.fixture(scope="module")
def model(whole):
    return str(whole / "initial_model")


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """An uninterrupted run that others are compared with; its groups carry signal."""
    directory = tmp_path_factory.mktemp("base") / "run"
    start(model, directory)
    return directory


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than training here; `whole` is made with it."""
    monkeypatch.setattr(train.plots, "draw_all", lambda directory: None)


def test_a_run_writes_its_record(whole):
    rows = metrics.read(whole)
    assert values(rows, "step") == list(range(1, 9))
    for row in rows:
        assert metrics.NAMES <= row.keys()
        assert 0 <= row["mismatch/logprob_max_abs"] < 1e-4
        assert re.fullmatch("[0-9a-f]{64}", row["rollout/tokens_digest"])
        assert row["rollout/tokens"] > 0 and row["rollout/tokens_per_s"] > 0
        assert row["policy/entropy"] > 0
        stages = ("rollout", "reward", "inference", "update", "sync", "compile")
        spent = sum(row[f"time/{stage}_s"] for stage in stages)
        assert 0 < spent <= row["time/step_s"]
        texts = tiny_runs.rollouts(whole, row["step"])
        assert len(texts) == 16
        assert sum(text["num_tokens"] for text in texts) == row["rollout/tokens"]
        rewards = [text["reward"] for text in texts]
        assert np.mean(rewards) == pytest.approx(row["reward/mean"])
        # The task's own verifier judged.
        right = [float(t["text"].strip() == t["answer"]) for t in texts]
        assert rewards == right
    assert len(set(values(rows, "rollout/tokens_digest"))) == len(rows)


def test_a_run_writes_its_files(whole):
    expected = json.loads((whole / "config.json").read_text())
    assert expected["rollout"]["group_size"] == 4
    steps = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    assert steps == {6, 8}  # checkpoint.every=2, checkpoint.keep=2
    assert (whole / "tokenizer" / "tokenizer.json").is_file()
    assert (whole / "initial_model" / "model.safetensors").is_file()
    assert {"reward.png", "lengths.png", "time_split.png"} <= {
        path.name for path in (whole / "plots").iterdir()
    }
    assert list((whole / "tensorboard").glob("events.*"))


def test_the_same_settings_give_the_same_run(whole, model, tmp_path):
    """From the directory of the model that the other run made in its own."""
    rows = start(model, tmp_path, **{"reward.functions": (), "checkpoint.every": 0})
    assert decisive(rows) == decisive(metrics.read(whole))
    assert policy(tmp_path) == policy(whole)


def signalled(command, directory, number, num_rows):
    """Send a signal once so many rows are there; return status, output and what was."""
    record, delay_s = directory / metrics.FILE, random.uniform(0.0, 0.05)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        while process.poll() is None:
            if record.exists() and record.read_bytes().count(b"\n") >= num_rows:
                break
            time.sleep(0.005)
        time.sleep(delay_s)
        process.send_signal(number)
        output, errors = process.communicate()
    return process.returncode, output, errors, f"{delay_s} s after row {num_rows}"


def test_a_run_that_was_stopped_and_killed_goes_on_bit_for_bit(base, model, tmp_path):
    command = [sys.executable, "-m", "tlt_jax.main", "--config=tests/tiny_runs.py"]
    command += [f"--config.{key}={value}" for key, value in settings(model).items()]
    command += [f"--workdir={tmp_path}"]
    number, num_rows = random.choice(stopping.SIGNALS), random.randrange(1, 4)
    status, output, errors, when = signalled(command, tmp_path, number, num_rows)
    assert status == 128 + number, errors
    assert output == "stopping after this step: saving; Ctrl-C again ends at once\n"
    step = values(metrics.read(tmp_path), "step")[-1]
    # The step was let end, and is on disk whatever checkpoint.every says.
    assert step >= num_rows and checkpoint.newest(tmp_path) == step
    assert errors == (
        f"stopped: step {step} of 8 is saved in {tmp_path}/checkpoints/{step}; the "
        "same command resumes.\n"
    )
    num_rows = random.randrange(step + 1, 7)
    status, _, errors, again = signalled(command, tmp_path, signal.SIGKILL, num_rows)
    assert status == -signal.SIGKILL, errors
    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    when = f"stopped {when}, killed {again}"
    rows = metrics.read(tmp_path)
    assert decisive(rows) == decisive(metrics.read(base)), when
    assert policy(tmp_path) == policy(base), when
    for step in values(rows, "step"):
        assert tiny_runs.rollouts(tmp_path, step) == tiny_runs.rollouts(base, step)


def stopped_in(work, nth, monkeypatch, model, directory, **more):
    """Ask a run to stop before the nth call of a method, with no grace left."""
    stop, (owner, name), num_calls = stopping.Stop(), work, 0
    whole, trainers = getattr(owner, name), []
    init = train.Trainer.__init__

    def remember(trainer, *arguments):
        trainers.append(trainer)
        init(trainer, *arguments)

    def ask(*arguments, **options):
        nonlocal num_calls
        num_calls += 1
        if num_calls == nth:
            stop.signal = signal.SIGTERM
            trainers[0].abandon()
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ask)
        patch.setattr(train.Trainer, "__init__", remember)
        with pytest.raises(failures.Stopped) as raised:
            run = tiny_runs.config_of(**settings(model, **more))
            train.train(run, directory, stop)
    assert raised.value.status == 143
    return str(raised.value)


def test_work_that_takes_too_long_is_given_up_and_made_up_for(
    base, model, tmp_path, monkeypatch
):
    """The first rollout, the fourth, and the evaluation of step 6."""
    judged = {"eval.every": 3, "eval.num_prompts": 6, "checkpoint.every": 0}
    whole = start(model, tmp_path / "whole", **judged)
    rollout, one = (collector.Collector, "collect"), tmp_path / "one"
    told = stopped_in(rollout, 1, monkeypatch, model, one, **judged)
    assert told.startswith("stopped before a step was saved in ")
    told = stopped_in(rollout, 4, monkeypatch, model, one, **judged)
    assert f"step 3 of 8 is saved in {one}/checkpoints/3;" in told
    assert values(metrics.read(one), "step") == [0, 1, 2, 3]
    # Of the resumed run's evaluations this is the first.
    judging = evaluator.Evaluator, "evaluate"
    told = stopped_in(judging, 1, monkeypatch, model, one, **judged)
    assert "step 6 of 8 is saved" in told
    row = metrics.read(one)[-1]
    assert row["step"] == 6 and not [name for name in row if name.startswith("eval/")]
    rows = start(model, one, **judged)
    assert decisive(rows) == decisive(whole)
    assert policy(one) == policy(base)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            {
                "rollout.max_batch": 2,
                "cache.page_size": 16,
                "rollout.steps_per_call": 5,
                "rollout.prefill_chunk": 1,
                "rollout.check_kernels": True,
                "reward.workers": 2,
            },
            id="narrow",
        ),
        pytest.param(
            # The cache stays as it is, so that programs are found again.
            {"rollout.max_batch": 8, "cache.num_pages": 21},
            id="wide",
        ),
    ],
)
def test_tokens_do_not_depend_on_how_they_are_computed(base, model, tmp_path, other):
    rows = start(model, tmp_path, num_steps=4, **other)
    expected = metrics.read(base)[:4]
    for name in ("rollout/tokens_digest", "reward/mean", "length/mean"):
        assert values(rows, name) == values(expected, name)
    assert values(rows, "rollout/decode_steps") != values(
        expected, "rollout/decode_steps"
    )


def test_suffix_matches_change_nothing_but_the_number_of_forwards(
    base, model, tmp_path
):
    settings = {
        "specdec.mode": "ngram",
        "specdec.ngram_strategies": ("4:D3K2V5-ngram",),
        "specdec.tuner": "static",
    }
    rows = start(model, tmp_path, num_steps=4, **settings)
    expected = metrics.read(base)[:4]
    for name in ("rollout/tokens_digest", "reward/mean", "length/mean"):
        assert values(rows, name) == values(expected, name)
    assert max(values(rows, "mismatch/logprob_max_abs")) < 1e-4
    assert set(values(rows, "specdec/strategy")) == {"D3K2V5-ngram"}
    assert max(values(rows, "specdec/accept_length")) > 1
    for row in rows:
        rates = row["specdec/accept_rate_by_depth"]
        assert len(rates) == 3 and all(0 <= rate <= 1 for rate in rates)
    steps = values(rows, "rollout/decode_steps")
    assert sum(steps) < sum(values(expected, "rollout/decode_steps"))


def test_eight_devices_draw_the_tokens_of_one(base, model, tmp_path):
    parts = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    assert jax.device_count() == 8
    rows = start(model, tmp_path, num_steps=3, **parts)
    expected = metrics.read(base)[:3]
    assert values(rows, "rollout/tokens_digest") == values(
        expected, "rollout/tokens_digest"
    )
    assert max(values(rows, "mismatch/logprob_max_abs")) < 1e-4
    np.testing.assert_allclose(
        values(rows, "policy/grad_norm"),
        values(expected, "policy/grad_norm"),
        rtol=1e-3,
    )


def test_a_finished_run_says_so_and_more_steps_are_added(
    base, model, tmp_path, monkeypatch, capsys
):
    directory = tmp_path / "run"
    shutil.copytree(base, directory)
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        # It loads nothing.
        patch.setattr(train, "Trainer", None)
        # Nor does it draw, but for what a death at the end has left undone.
        drawn: list = []
        patch.setattr(train.plots, "draw_all", drawn.append)
        start(model, directory, **{"log.progress": "plain"})
        assert not drawn
        (directory / "plots").rename(tmp_path / "plots")
        start(model, directory)
        (tmp_path / "plots").rename(directory / "plots")
    assert drawn == [directory]
    told = capsys.readouterr().out
    assert told.startswith("finished: step 8 of 8, reward ")
    assert told.endswith("the same command with --config.num_steps=16\n")
    after = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    assert after == before | {directory / ".lock": after[directory / ".lock"]}
    with pytest.raises(schema.ConfigError, match="num_steps=7, but the run in .* 8 st"):
        start(model, directory, num_steps=7)
    assert policy(directory) == policy(base)
    content = (directory / metrics.FILE).read_bytes()
    rows = start(model, directory, num_steps=10, **{"checkpoint.keep": 3})
    assert (directory / metrics.FILE).read_bytes().startswith(content)
    assert values(rows, "step") == list(range(1, 11))
    assert policy(directory, step=8) == policy(base)


def test_other_settings_are_refused_before_anything_is_touched(base, model, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(schema.ConfigError, match=r"holds a run with seed=0, not 5: "):
        start(model, tmp_path / "run", seed=5)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_model_that_has_changed_is_refused_by_name(base, model, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    weights = pathlib.Path(model) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(schema.ConfigError) as raised:
            start(model, tmp_path / "run", num_steps=10)
    finally:
        weights.write_bytes(whole)
    assert "has read another model.safetensors (model; SHA-256 " in str(raised.value)
    assert metrics.read(tmp_path / "run") == metrics.read(base)
    assert policy(tmp_path / "run") == policy(base)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_passed_over_on_request(base, model, tmp_path, capsys):
    """The steps since the one before it are taken again, and are the same."""
    shutil.copytree(base, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "8"
    largest = max(damage.files(newest / "policy"), key=lambda p: p.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    more = {"num_steps": 9, "log.progress": "plain"}
    with pytest.raises(checkpoint.DamagedError, match=f"Delete {newest} to go on from"):
        start(model, tmp_path / "run", **more)
    rows = start(model, tmp_path / "run", **more | {"checkpoint.on_damage": "previous"})
    said = capsys.readouterr().out
    assert "That of step 6 is taken instead, and this one removed." in said
    assert "resuming after step 6 of 9" in said
    assert decisive(rows)[:8] == decisive(metrics.read(base))
    assert policy(tmp_path / "run", 8) == policy(base)


def test_a_reward_function_that_fails_is_counted(model, tmp_path, monkeypatch):
    """It raises or returns NaN by the text's length, and hangs once."""
    hangs = tmp_path / "hangs"
    hangs.mkdir()
    monkeypatch.setenv("TLT_JAX_TEST_HANG", str(hangs))
    rows = start(
        model,
        tmp_path / "run",
        num_steps=2,
        **{
            "reward.functions": ("tests.judges:unreliable",),
            "reward.workers": 1,
            "reward.timeout_s": 2.0,
            "reward.failure_reward": -1.0,
        },
    )
    assert values(rows, "reward/num_timeout") == [1, 0]
    for row in rows:
        texts = tiny_runs.rollouts(tmp_path / "run", row["step"])
        lengths = np.array([len(text["text"]) for text in texts])
        assert row["reward/num_error"] == pytest.approx(
            np.sum(lengths % 3 == 0), abs=row["reward/num_timeout"]
        )
        assert row["reward/num_nonfinite"] == pytest.approx(
            np.sum(lengths % 3 == 1), abs=row["reward/num_timeout"]
        )
        kinds = ("error", "nonfinite", "timeout", "crashed")
        failed = sum(row[f"reward/num_{kind}"] for kind in kinds)
        assert row["reward/num_failed"] == failed > 0
        assert row["reward/mean"] == pytest.approx((16 - 2 * failed) / 16)
        assert row["reward/first_failure"]
        assert row["policy/update_skipped"] == 0
    assert "more than timeout_s=2" in rows[0]["reward/first_failure"]


def test_long_prompts_are_refused_or_left_out_and_counted(model, tmp_path, capsys):
    numbers = {
        "task.options": {"max_operand": 12, "operators": "+-"},
        "task.max_prompt_tokens": 4,
    }
    with pytest.raises(ValueError, match="more than task.max_prompt_tokens=4: raise"):
        start(model, tmp_path / "refused", **numbers, **{"reward.workers": 1})
    # What had been started is ended.
    assert not [t for t in threading.enumerate() if t.name == "reward"]
    rows = start(
        model,
        tmp_path / "skipped",
        num_steps=1,
        **numbers,
        **{"task.long_prompts": "skip", "log.progress": "plain"},
    )
    skipped = rows[0]["rollout/prompts_skipped"]
    assert 0 < skipped < 64
    assert f"{skipped} prompts (train) are longer than" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no prompt is left of 64 \(64 are longer"):
        start(
            model,
            tmp_path / "none",
            **{"task.long_prompts": "skip", "task.max_prompt_tokens": 1},
        )


def test_evaluation_is_recorded_and_changes_nothing(base, model, tmp_path):
    rows = start(
        model,
        tmp_path,
        num_steps=4,
        **{
            "eval.every": 2,
            "eval.num_prompts": 6,
            "eval.samples": 2,
            "eval.k": (1, 2),
            "eval.temperature": 0.0,
        },
    )
    assert values(rows, "step") == [0, 1, 2, 3, 4]
    for row in rows[::2]:
        assert 0 <= row["eval/avg@2"] <= 1
        # Greedy samples of a prompt are alike.
        assert row["eval/avg@2"] == row["eval/pass@1"] == row["eval/pass@2"]
    assert "eval/avg@2" not in rows[1]
    assert rows[2]["time/eval_s"] > 0
    assert values(rows[1:], "rollout/tokens_digest") == values(
        metrics.read(base)[:4], "rollout/tokens_digest"
    )


def test_stop_strings_end_completions(model, tmp_path):
    start(model, tmp_path, num_steps=1, **{"rollout.stop": ("1", "2")})
    texts = tiny_runs.rollouts(tmp_path, 1)
    stopped = [text for text in texts if text["finish_reason"] == "stop"]
    assert stopped
    for text in texts:
        body = text["text"] if text not in stopped else text["text"][:-1]
        assert not {"1", "2"} & set(body)
    assert all(text["text"][-1] in "12" for text in stopped)


def test_texts_longer_than_the_models_context_are_refused(model, tmp_path):
    long = {"task.max_prompt_tokens": 64, "learner.row_tokens": 128}
    message = (
        "max_prompt_tokens=64 .* up to 7[0-9] tokens, but .* context .* is 1[0-9]:"
    )
    with pytest.raises(ValueError, match=message):
        start(model, tmp_path, **long)
    assert not (tmp_path / metrics.FILE).exists()


def test_a_reward_worker_that_cannot_start_is_told_before_the_first_rollout(
    model, tmp_path, monkeypatch
):
    (tmp_path / "user_shy.py").write_text(
        "import os\n"
        f"if os.getpid() != {os.getpid()}: raise RuntimeError('not in workers')\n"
        "def fn(example, text): return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shy = {"reward.functions": ("user_shy:fn",), "reward.workers": 1}
    with pytest.raises(failures.UserError, match="cannot start: .*not in workers"):
        start(model, tmp_path / "run", **shy)
    assert not (tmp_path / "run" / "rollouts").exists()


def test_a_full_disk_is_named_and_costs_nothing(
    base, model, tmp_path, monkeypatch, capsys
):
    """The sixth row finds no room; with room the same command completes the run."""
    write, num_rows = os.write, 0

    def full(file, data):
        nonlocal num_rows
        num_rows += data.startswith(b'{"')
        if num_rows > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "write", full)
        with pytest.raises(metrics.MetricsError, match="No space left on device"):
            start(model, tmp_path)
    assert len(metrics.read(tmp_path)) == 5
    rows = start(model, tmp_path, **{"log.progress": "plain"})
    assert "resuming after step 4 of 8" in capsys.readouterr().out
    assert decisive(rows) == decisive(metrics.read(base))
    assert policy(tmp_path) == policy(base)


def test_a_directory_in_use_is_left_alone(base, model, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / "10.orbax-checkpoint-tmp"
    unfinished.mkdir()
    run = tiny_runs.config_of(**settings(model))
    with workdir.claimed(tmp_path / "run", run):
        with pytest.raises(files.WorkdirError, match="another process works in"):
            start(model, tmp_path / "run", num_steps=10)
    assert unfinished.is_dir()
