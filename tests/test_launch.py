"""The launcher: real processes that find each other, die, and are started again."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tlt_jax import launch
from tlt_jax.executors import member as member_lib
from tlt_jax.runtime import distributed, stopping

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEMBER = """
import json, jax
from tlt_jax.runtime import distributed, sharding
distributed.initialize()
with distributed.join() as group:
    mesh = sharding.make_mesh()
    assert sharding.spans_processes(mesh)
    named = sharding.named(mesh, sharding.ShardingRules(), ("batch",))
    import numpy as np
    whole = sharding.place(np.arange(4.0), named)
    total = float(jax.jit(lambda x: (x * x).sum())(whole))
    group.check_same("settings", {"a": 1})
    try:
        group.check_same("settings", group.index)
    except ValueError as error:
        told = str(error)
    made = group.first("thing", lambda: f"made by {group.index}")
    indices = group.exchange("index", group.index)
    print(json.dumps([group.index, indices, made, total, told]))
"""


def environment(index, num, port):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        distributed.COORDINATOR: f"127.0.0.1:{port}",
        distributed.NUM_PROCESSES: str(num),
        distributed.PROCESS: str(index),
    }


def task_of_slurm(index, num, port):
    """What `srun` says to a task; the job's number gives the port."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(num),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


@pytest.mark.parametrize(
    "environment_of,initialize",
    [
        (environment, "initialize()"),
        pytest.param(
            task_of_slurm, "initialize(on_cluster=True)", marks=pytest.mark.slow
        ),
    ],
    ids=["launch", "slurm"],
)
def test_processes_join_and_share_arrays(environment_of, initialize):
    _, _, port = member_lib.Member().address("127.0.0.1").partition(":")
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER.replace("initialize()", initialize)],
            cwd=ROOT,
            env=environment_of(i, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for i, member in enumerate(members):
        out, err = member.communicate(timeout=60)
        assert member.returncode == 0, err
        found = json.loads(out.splitlines()[-1])
        told = found.pop()
        assert found == [i, [0, 1], "made by 0", 14.0]
        assert told.startswith("the processes have different settings: start all")


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--", "--workdir=x"], "--processes"),
        (["--processes=0", "--", "--workdir=x"], "--processes=0: give at least 1"),
        (["--processes=2", "--", "--config=x"], "--workdir=DIR is missing behind --"),
        (["--processes=2", "--workdir=x"], "--workdir=x is no option of launch"),
        (["--processes=2", "--", "--workdir=/proc/no"], "/proc/no cannot be written"),
        (["--processes=2", "--restarts=-1", "--"], "--restarts=-1: give 0 or more"),
        (["--processes=2", "--devices_per_process=0"], "_process=0: give at least 1"),
        (["--processes=2", "--cpus_per_process=nan", "--"], "=nan: give more than 0"),
        (["--processes=2", "--executor=slurm", "--"], "'slurm' (choose from"),
    ],
)
def test_bad_command_lines(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


class Process:
    """Ends with the status that a test wants; None: when it is told to."""

    pid = 0

    def __init__(self, arguments, code, stdout=None, **settings):
        self.arguments, self.settings, self.code = arguments, settings, code
        if stdout is not None:
            stdout.write(b"".join(b"line %d\n" % i for i in range(20)))
        self.env = settings["env"]

    def poll(self):
        return self.code

    def terminate(self):
        if self.code is None:
            self.code = -signal.SIGTERM

    kill = terminate

    def wait(self, timeout=None):
        return self.code


@pytest.fixture
def started(monkeypatch, tmp_path, capsys):
    """Launch processes that end so; return the status, them, and what is said."""

    def launch_all(codes, *own, num=None):
        left, made = list(codes), []

        def popen(arguments, **settings):
            made.append(Process(arguments, left.pop(0), **settings))
            return made[-1]

        monkeypatch.setattr(member_lib.subprocess, "Popen", popen)
        monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
        monkeypatch.setattr(launch, "_GRACE_S", 0.0)
        count = f"--processes={num or len(codes)}"
        program = ["--", "--config=x.py", f"--workdir={tmp_path}"]
        status = launch.main([count, *own, *program])
        return status, made, capsys.readouterr().err

    return launch_all


def test_each_process_is_told_who_it_is(started, tmp_path):
    own = ("--devices_per_process=2", "--module=some.program")
    status, made, _ = started([0, 0, 0], *own)
    assert status == 0 and len(made) == 3
    (address,) = {process.env[distributed.COORDINATOR] for process in made}
    assert address.startswith("127.0.0.1:")
    names = (distributed.NUM_PROCESSES, distributed.PROCESS, distributed.DEVICES)
    assert [tuple(process.env[n] for n in names) for process in made] == [
        ("3", "0", "0,1"),
        ("3", "1", "2,3"),
        ("3", "2", "4,5"),
    ]
    program = ["--config=x.py", f"--workdir={tmp_path}"]
    for process in made:
        assert process.arguments == [sys.executable, "-m", "some.program", *program]
    # The first has the terminal, the others a file each and no input.
    stdin = [process.settings["stdin"] for process in made]
    assert stdin == [None, subprocess.DEVNULL, subprocess.DEVNULL]
    logs = sorted(path.name for path in (tmp_path / "processes").iterdir())
    assert logs == ["1.log", "2.log"]


@pytest.mark.parametrize(
    "codes,status,told",
    [
        # Who was killed is the cause of what the first says.
        ([1, 0, -9], 1, "process 2 of 3 ended with signal SIGKILL, and the run"),
        ([None, 3, 4], 3, "process 1 of 3 ended with status 3, and the run"),
        ([1, None, 1], 1, "process 0 of 3 ended with status 1, and the run"),
        # It has said what its user can mend.
        ([2, 2, 2], 2, ""),
    ],
)
def test_who_failed_first_is_named_and_the_others_end(started, codes, status, told):
    found, made, err = started(codes, "--restarts=0")
    assert found == status and told in err
    assert [process.code for process in made] == [
        -signal.SIGTERM if code is None else code for code in codes
    ]
    if not told:
        assert err == ""
    elif "process 0" in told:
        assert "The end of" not in err
    else:
        assert "1.log:\n" in err if "process 1" in told else "2.log:\n" in err
        assert err.endswith("line 18\nline 19\n") and "line 8\n" in err
        assert "line 7\n" not in err


def test_where_one_is_killed_all_begin_again(started, tmp_path):
    """With a port of their own, and from the newest checkpoint."""
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "6.partial").mkdir()
    # Who has lost another one ends with an error of its own.
    status, made, err = started([2, -9, None, -6, 0, 0], num=2)
    assert status == 0 and len(made) == 6
    assert made[2].code == -signal.SIGTERM
    addresses = [process.env[distributed.COORDINATOR] for process in made]
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]
    begins = [process.env[distributed.PROCESS] for process in made]
    assert begins == ["0", "1"] * 3
    where = "all are started again and go on from the checkpoint of step 5"
    assert err.splitlines() == [
        f"process 1 of 2 was ended by signal SIGKILL: {where} (1 of 3 times without a "
        "new one).",
        f"process 1 of 2 was ended by signal SIGABRT: {where} (2 of 3 times without a "
        "new one).",
    ]


def test_what_does_not_help_is_not_repeated(started):
    """Without a new checkpoint three times; with an error of one's own not once."""
    status, made, err = started([None, -11] * 4, num=2)
    assert status == 1 and len(made) == 8
    assert err.count("all are started again and go on from the beginning") == 3
    assert "error: process 1 of 2 ended with signal SIGSEGV, and the run" in err
    status, made, err = started([None, 1], num=2)
    assert status == 1 and len(made) == 2 and "again" not in err


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_is_passed_on_once_and_the_end_waited_for(
    monkeypatch, tmp_path, capsys, number
):
    """Process 1 ends two looks after the first one; the second Ctrl-C is no wait."""
    monkeypatch.setattr(launch, "_POLL_S", 0.0)

    class Slow(Process):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.told, self.killed, self.looks = 0, 0, 0

        def poll(self):
            if self is made[0] and not self.told:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)
            self.looks += self.told
            return 143 if self.looks > 2 * made.index(self) else None

        def terminate(self):
            self.told += 1

        def kill(self):
            self.killed += 1

    made = []

    def popen(arguments, **settings):
        made.append(Slow(arguments, None, **settings))
        return made[-1]

    monkeypatch.setattr(member_lib.subprocess, "Popen", popen)
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    program = ["--", "--config=x.py", f"--workdir={tmp_path}"]
    assert launch.main(["--processes=2", *program]) == 128 + number
    assert capsys.readouterr().err == ""
    assert made[0].told == 1 and made[0].killed == made[1].killed == 0
    # A terminal's Ctrl-C comes to the launcher alone.
    assert [one.settings["process_group"] for one in made] == [0, 0]
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


def test_another_program_can_be_started(tmp_path):
    program = ["--processes=2", "--module=platform", "--", f"--workdir={tmp_path}"]
    start = [sys.executable, "-m", "tlt_jax.launch", *program]
    assert subprocess.run(start, cwd=ROOT, timeout=60).returncode == 0
    assert "-" in (tmp_path / "processes" / "1.log").read_text()


# Process 1 dies of SIGKILL, twice, while process 0 waits for it; the third world ends.
MORTAL = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1].removeprefix("--workdir="))
index = os.environ["TLT_JAX_PROCESS"]
(folder / "begun").open("a").write(index + os.environ["TLT_JAX_COORDINATOR"] + "\\n")
print("speaks", index, flush=True)
starts = [line[0] for line in (folder / "begun").read_text().splitlines()]
if index == "1" and starts.count("1") < 3:
    while starts.count("0") < starts.count("1"):
        time.sleep(0.01)
        starts = [line[0] for line in (folder / "begun").read_text().splitlines()]
    os.kill(os.getpid(), signal.SIGKILL)
while starts.count("1") < 3:
    time.sleep(0.01)
    starts = [line[0] for line in (folder / "begun").read_text().splitlines()]
"""


@pytest.mark.parametrize(
    "executor",
    [
        "local",
        pytest.param(
            "ray",
            marks=[
                pytest.mark.ray,
                pytest.mark.skipif(
                    importlib.util.find_spec("ray") is None, reason="no Ray"
                ),
            ],
        ),
    ],
)
def test_a_real_world_goes_on_after_kill_9(tmp_path, executor):
    (tmp_path / "mortal.py").write_text(MORTAL)
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    variables = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
    own = [f"--executor={executor}", "--processes=2", "--module=mortal"]
    ended = subprocess.run(
        [sys.executable, "-m", "tlt_jax.launch", *own, "--", f"--workdir={tmp_path}"],
        cwd=ROOT,
        env=variables | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    told = "process 1 of 2 was ended by signal SIGKILL: all are started again"
    assert ended.stderr.count(told) == 2
    assert ended.stdout.splitlines() == ["speaks 0"] * 3
    begun = (tmp_path / "begun").read_text().splitlines()
    assert sorted(line[0] for line in begun) == list("000111")
    assert len({line[1:] for line in begun}) == 3
