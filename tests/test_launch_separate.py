"""The launcher with rollout workers in processes of their own, and such runs."""

import importlib.util
import os
import signal
import subprocess
import time

import pytest

from tests import deaths, test_launch, test_launched_runs, tiny_runs
from tlt_jax import launch, train
from tlt_jax.executors import member as member_lib
from tlt_jax.runtime import distributed
from tlt_jax.settings import schema
from tlt_jax.workdir import metrics

RECIPE = f"--config={test_launch.ROOT / 'tests' / 'tiny_runs.py'}"
SEPARATE = "--config.workers.placement=separate"
JUDGED = "--config.reward.placement=separate"
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
    """Launch one learner, which ends when all codes of helpers are used, and two."""

    def launch_all(codes, *own, wanted=(SEPARATE, "--config.workers.num=2")):
        left, made = list(codes), []

        class Learner(test_launch.Process):
            def poll(self):
                return None if left and self.code is None else self.code or 0

        def popen(arguments, **settings):
            is_learner = distributed.PROCESS in settings["env"]
            kind = Learner if is_learner else test_launch.Process
            code = None if is_learner else left.pop(0)
            made.append(kind(arguments, code, **settings))
            return made[-1]

        monkeypatch.setattr(member_lib.subprocess, "Popen", popen)
        monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
        monkeypatch.setattr(launch, "_GRACE_S", 0.0)
        program = ["--", RECIPE, *wanted]
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


def test_reward_workers_find_every_process_of_the_learner(started):
    wanted = (JUDGED, "--config.reward.workers=2")
    status, made, err = started([-9, None, None], "--processes=2", wanted=wanted)
    assert status == 0
    assert err == (
        "reward worker 0 was ended by signal SIGKILL: it is started again, and others "
        "judge in its place.\n"
    )
    names = (distributed.PROCESS, distributed.REWARD_WORKER, distributed.DEVICES)
    told = [tuple(one.env.get(name) for name in names) for one in made]
    assert told == [
        *(("0", None, "0"), ("1", None, "1")),
        *((None, "0", "2"), (None, "1", "3"), (None, "0", "2")),
    ]
    # They take nothing of the learner's devices, and nobody rolls out elsewhere.
    assert [one.env["JAX_PLATFORMS"] for one in made[2:]] == ["cpu"] * 3
    assert not any(distributed.MEETING in one.env for one in made)
    (found,) = {one.env[distributed.REWARD_MEETINGS] for one in made}
    first, second = found.split(",")
    assert first != second and first.startswith("127.0.0.1:")
    assert made[0].env[distributed.COORDINATOR] not in (first, second)


def test_who_has_heard_the_end_of_a_lost_world_is_begun_again(
    monkeypatch, tmp_path, capsys
):
    """Process 0 had ended well when its run lost another process."""
    codes, made = [0, -9, 0, None, 0, 0, None], []

    def popen(arguments, **settings):
        made.append(test_launch.Process(arguments, codes[len(made)], **settings))
        return made[-1]

    monkeypatch.setattr(member_lib.subprocess, "Popen", popen)
    program = [RECIPE, SEPARATE, "--config.workers.num=2", f"--workdir={tmp_path}"]
    assert launch.main(["--processes=2", "--", *program]) == 0
    assert "process 1 of 2 was ended by signal SIGKILL: all" in capsys.readouterr().err
    workers = [one.env.get(distributed.WORKER) for one in made]
    assert workers == [None, None, "0", "1", None, None, "0"]


def test_a_worker_that_does_not_live_ends_the_run(started):
    status, made, err = started([-9, None, -9, -9, -9, None], "--restarts=2")
    assert status == 1 and len(made) == 5
    assert err.count("it is started again") == 2
    assert "error: process 1 of 3 ended with signal SIGKILL, and the run" in err
    # An error of its own is no reason to start it again.
    status, made, err = started([None, 3, None])
    assert status == 3 and len(made) == 3
    assert "error: process 2 of 3 ended with status 3, and the run with it." in err


NEEDS_RAY = (
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray"),
)


@pytest.mark.parametrize(
    "executor,processes",
    [
        pytest.param("local", 1, marks=pytest.mark.slow),
        pytest.param("local", 2, marks=pytest.mark.slow),
        pytest.param("ray", 1, marks=NEEDS_RAY),
        pytest.param("ray", 2, marks=NEEDS_RAY),
    ],
)
def test_a_run_with_workers_of_its_own_survives_the_death_of_any(
    tmp_path, executor, processes
):
    """Two rollout workers, which may train a drafter, and a reward worker."""
    settings = (
        *("--config.num_steps=40", "--config.mesh.data=-1", "--config.eval.every=20"),
        *("--config.eval.temperature=0", "--config.checkpoint.every=5"),
        # With answers of such lengths one worker waits for the other for a while.
        "--config.rollout.max_new_tokens=56",
    )
    devices = f"--xla_force_host_platform_device_count={processes}"
    status, output = test_launched_runs.run(
        tmp_path / "one", 1, *settings, XLA_FLAGS=devices
    )
    assert status == 0, output
    directory = tmp_path / "separate"
    words = test_launched_runs.command(
        *(directory, processes, *settings, SEPARATE, "--config.workers.num=2"),
        *(JUDGED, "--config.reward.workers=1", *ADAPTED),
    )
    own = (f"--executor={executor}", "--cpus_per_process=0.25")
    words[words.index("--") : words.index("--")] = own
    variables = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.Popen(
        words,
        cwd=test_launch.ROOT,
        env=variables | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    record, until = directory / metrics.FILE, time.monotonic() + 300
    victims = "rollout worker 1", "reward worker 0", f"process {processes - 1}"
    for index, victim in enumerate(victims):
        while not (record.exists() and record.read_text().count("\n") > 6 + 6 * index):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        if not index:
            before = deaths.members(directory)
        os.kill(deaths.members(directory)[victim], signal.SIGKILL)
    while record.read_text().count("\n") < 22:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    # The worker that nobody has killed is the one of the beginning.
    worker = deaths.members(directory)["rollout worker 0"]
    assert worker == before["rollout worker 0"]
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    for told in (
        "rollout worker 1 was ended by signal SIGKILL: it is started again, and ",
        "reward worker 0 was ended by signal SIGKILL: it is started again, and ",
        f"process {processes - 1} of {processes} was ended by signal SIGKILL: all are ",
    ):
        assert output.count(told) == 1
    names = ("step", "rollout/tokens_digest", "policy/weights_digest", "reward/mean")
    names += ("policy/loss", "eval/avg@1", "eval/pass@1", "reward/num_failed")
    expected, found = metrics.read(tmp_path / "one"), metrics.read(directory)
    for row, wanted in zip(found, expected, strict=True):
        assert {n: row.get(n) for n in names} == {n: wanted.get(n) for n in names}
    assert tiny_runs.unknown_keys(found) == []
    # Nothing is left of it.
    assert deaths.members(directory) == {}


@pytest.mark.slow
def test_a_worker_of_its_own_trains_the_drafter(tmp_path):
    """Between rollout and update, as it is alone; the learner is killed once."""
    settings = ("--config.num_steps=16", "--config.checkpoint.every=2")
    # What it knows of a text is more than nothing.
    settings += (*ADAPTED, "--config.specdec.ngram_strategies=")
    settings += ("--config.adaptation.max_steps=3",)
    status, output = test_launched_runs.run(tmp_path / "one", 1, *settings)
    assert status == 0, output
    directory = tmp_path / "separate"
    run = test_launched_runs.start(directory, 1, *settings, SEPARATE)
    record, until = directory / metrics.FILE, time.monotonic() + 200
    while not (record.exists() and record.read_text().count("\n") > 8):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(deaths.members(directory)["process 0"], signal.SIGKILL)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    expected, found = metrics.read(tmp_path / "one"), metrics.read(directory)
    names = ("step", "rollout/tokens_digest", "policy/weights_digest", "policy/loss")
    for row, wanted in zip(found, expected, strict=True):
        assert {n: row.get(n) for n in names} == {n: wanted.get(n) for n in names}
    updates = tiny_runs.values(found[1:], "drafter/num_updates")
    # How often that pays is a matter of clocks.
    assert updates == sorted(updates) and updates[-1] >= 1, updates
    versions = tiny_runs.values(found[1:], "drafter/version")
    assert versions == sorted(versions) and versions[-1] >= 1, versions


@pytest.mark.parametrize("name", ["workers", "reward"])
def test_without_a_launcher_nobody_would_do_it(tmp_path, name):
    told = f"{name}.placement='separate' without a launcher: tlt_jax.launch starts "
    with pytest.raises(schema.ConfigError, match=told):
        settings = {f"{name}.placement": "separate", "reward.workers": 1}
        train.train(tiny_runs.config_of(**settings), tmp_path)
