"""The launcher with rollout workers in processes of their own, and such runs."""

import os
import pathlib
import signal
import time

import pytest

from tests import test_launch, test_launched_runs, tiny_runs
from tlt_jax import launch, train
from tlt_jax.executors import member as member_lib
from tlt_jax.runtime import distributed
from tlt_jax.settings import schema
from tlt_jax.workdir import metrics

RECIPE = f"--config={test_launch.ROOT / 'tests' / 'tiny_runs.py'}"
SEPARATE = "--config.workers.placement=separate"
# A drafter so small that its steps are done while a worker waits.
ADAPTED = (
    *("--config.specdec.mode=tlt", "--config.drafter.features=last"),
    *("--config.specdec.strategies=1:D2K1V3", "--config.adaptation.num_rows=1"),
    "--config.specdec.ngram_strategies=1:D2K1V3-ngram",
    *("--config.adaptation.row_tokens=64", "--config.adaptation.row_bases=32"),
    *("--config.adaptation.head_chunk=32", "--config.adaptation.piece_bases=0"),
)


@pytest.fixture
def started(monkeypatch, tmp_path, capsys):
    """Launch one learner, which ends when all codes of workers are used, and two."""

    def launch_all(codes, *own):
        left, made = list(codes), []

        class Learner(test_launch.Process):
            def poll(self):
                return None if left and self.code is None else self.code or 0

        def popen(arguments, **settings):
            is_learner = distributed.WORKER not in settings["env"]
            kind = Learner if is_learner else test_launch.Process
            code = None if is_learner else left.pop(0)
            made.append(kind(arguments, code, **settings))
            return made[-1]

        monkeypatch.setattr(member_lib.subprocess, "Popen", popen)
        monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
        monkeypatch.setattr(launch, "_GRACE_S", 0.0)
        program = ["--", RECIPE, SEPARATE, "--config.workers.num=2"]
        status = launch.main(["--processes=1", *own, *program, f"--workdir={tmp_path}"])
        return status, made, capsys.readouterr().err

    return launch_all


def test_workers_stand_beside_the_world(started, tmp_path):
    status, made, err = started([None, None])
    assert status == 0 and err == ""
    names = (distributed.PROCESS, distributed.WORKER, distributed.DEVICES)
    assert [tuple(one.env.get(name) for name in names) for one in made] == [
        ("0", None, "0"),
        (None, "0", "1"),
        (None, "1", "2"),
    ]
    assert [distributed.COORDINATOR in one.env for one in made] == [True, False, False]
    for name in (distributed.MEETING, distributed.SECRET):
        assert len({one.env[name] for one in made}) == 1
    assert made[0].env[distributed.MEETING].startswith("127.0.0.1:")
    assert len(bytes.fromhex(made[0].env[distributed.SECRET])) == 32
    # The learner's end is theirs.
    assert [one.code for one in made[1:]] == [-signal.SIGTERM] * 2
    logs = sorted(path.name for path in (tmp_path / "processes").iterdir())
    assert logs == ["1.log", "2.log"]


def test_a_worker_that_is_killed_is_started_again_alone(started):
    status, made, err = started([-9, None, -9, None])
    assert status == 0
    workers = [one.env.get(distributed.WORKER) for one in made]
    assert workers == [None, "0", "1", "0", "0"]
    assert err.splitlines() == 2 * [
        "rollout worker 0 was ended by signal SIGKILL: it is started again, and others "
        "generate its requests."
    ]


def test_a_worker_that_does_not_live_ends_the_run(started):
    status, made, err = started([-9, None, -9, -9, -9, None], "--restarts=2")
    assert status == 1 and len(made) == 5
    assert err.count("it is started again") == 2
    assert "error: process 1 of 3 ended with signal SIGKILL, and the run" in err
    # An error of its own is no reason to start it again.
    status, made, err = started([None, 3, None])
    assert status == 3 and len(made) == 3
    assert "error: process 2 of 3 ended with status 3, and the run with it." in err


@pytest.mark.slow
def test_a_run_with_workers_of_its_own_survives_the_death_of_any(tmp_path):
    """One learner and two workers that train a drafter: digests of one process."""
    settings = ("--config.num_steps=40", "--config.eval.every=20")
    settings += ("--config.eval.temperature=0", "--config.checkpoint.every=5")
    # With answers of such lengths one worker waits for the other for a while.
    settings += ("--config.rollout.max_new_tokens=56",)
    status, output = test_launched_runs.run(tmp_path / "one", 1, *settings)
    assert status == 0, output
    directory = tmp_path / "separate"
    settings += (SEPARATE, "--config.workers.num=2", *ADAPTED)
    run = test_launched_runs.start(directory, 1, *settings)
    record, until = directory / metrics.FILE, time.monotonic() + 200

    def wait_for(num_rows):
        while not (record.exists() and record.read_text().count("\n") > num_rows):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.02)

    def processes():
        found = {}
        pid = run.pid
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
        for child in map(int, text.split()):
            environment = pathlib.Path(f"/proc/{child}/environ").read_bytes()
            told = dict(
                one.split(b"=", 1) for one in environment.split(b"\0") if b"=" in one
            )
            found[told.get(distributed.WORKER.encode(), b"learner").decode()] = child
        return found

    wait_for(6)
    before = processes()
    os.kill(before["1"], signal.SIGKILL)
    wait_for(12)
    os.kill(processes()["learner"], signal.SIGKILL)
    wait_for(18)
    # The worker that nobody has killed is the one of the beginning.
    assert processes()["0"] == before["0"]
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    assert "rollout worker 1 was ended by signal SIGKILL" in output
    assert "process 0 of 1 was ended by signal SIGKILL: all are started again" in output
    names = ("step", "rollout/tokens_digest", "policy/weights_digest", "reward/mean")
    names += ("policy/loss", "eval/avg@1", "eval/pass@1")
    expected, found = metrics.read(tmp_path / "one"), metrics.read(directory)
    for row, wanted in zip(found, expected, strict=True):
        assert {n: row.get(n) for n in names} == {n: wanted.get(n) for n in names}
    assert tiny_runs.unknown_keys(found) == []
    # Workers that waited have trained; what was learned survives all of it.
    assert sum(tiny_runs.values(found[1:], "workers/trained_s")) > 0
    for name in ("drafter/num_updates", "drafter/version"):
        counts = tiny_runs.values(found[1:], name)
        assert counts == sorted(counts) and counts[-1] > counts[0], counts


def test_without_a_launcher_nobody_rolls_out(tmp_path):
    told = "workers.placement='separate' without a launcher: tlt_jax.launch starts the"
    with pytest.raises(schema.ConfigError, match=told):
        train.train(tiny_runs.config_of(**{"workers.placement": "separate"}), tmp_path)
