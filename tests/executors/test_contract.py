"""Both executors do the same: one suite for this machine and for Ray."""

import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tlt_jax.executors import executor, local, member, on_ray

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a program does: says who it is, and ends as it is told.
PROGRAM = """
import os, signal, sys, time
print(os.environ["WHO"], os.getcwd(), flush=True)
how = sys.argv[1]
if how == "stay":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("stays", flush=True)
if how in ("wait", "stay"):
    time.sleep(60)
sys.exit(int(how))
"""
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)
KINDS = [
    pytest.param(
        local.Local,
        id="local",
        # Of JAX, whose threads an earlier test has started: a launcher has none.
        marks=pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    ),
    pytest.param(
        on_ray.OnRay,
        id="ray",
        marks=[
            pytest.mark.ray,
            needs_ray,
            # Ray's own.
            pytest.mark.filterwarnings("ignore"),
        ],
    ),
]
LONGEST_S = 60.0


@pytest.fixture(params=KINDS)
def operated(request, monkeypatch):
    """Two members of half a core each, stopped at the end."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = request.param()
    made.start([executor.Share(cpus=0.5)] * 2)
    yield made
    made.stop()


def run(operated, index, how, folder, **variables):
    log = folder / f"{index}.log"
    variables = {"WHO": f"number {index}"} | variables
    program = ["-c", PROGRAM, how]
    return operated.call(index, "run", program, variables, str(log), str(folder))


def lines(folder, index, count):
    """Waits until a program has said so many lines."""
    log, until = folder / f"{index}.log", time.monotonic() + LONGEST_S
    while not log.exists() or log.read_text().count("\n") < count:
        assert time.monotonic() < until
        time.sleep(0.01)
    return log.read_text().splitlines()


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return state[0] != "Z"


def test_a_world_is_started_watched_begun_again_and_stopped(operated, tmp_path):
    """All five verbs in one go: a cluster of Ray takes its time to begin."""
    folder = tmp_path / "folder"
    folder.mkdir()
    # Call.
    facts = operated.call(1, "facts")
    assert facts["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert facts.items() >= member.versions().items()
    operated.check_same(2)
    assert operated.host(1) == "127.0.0.1"
    host, _, port = operated.call(0, "address", operated.host(0)).partition(":")
    assert host == "127.0.0.1" and 1024 <= int(port) < 65536
    with pytest.raises(ValueError, match="method='_process': members have address, "):
        operated.call(0, "_process")
    with pytest.raises(OSError, match="No such file"):
        operated.call(0, "run", ["-c", ""], {}, str(tmp_path / "no" / "log"))
    # Watch: the rest of the world runs on.
    assert operated.watch() == [None, None]
    pids = [run(operated, 0, "wait", folder), run(operated, 1, "3", folder)]
    assert operated.watch(LONGEST_S) == [None, 3]
    assert lines(folder, 1, 1) == [f"number 1 {folder}"]
    log = str(folder / "1.log")
    assert operated.call(1, "read", log, 0) == f"number 1 {folder}\n"
    assert operated.call(1, "read", log, 7) == f"1 {folder}\n"
    # Death, and the same place again; what was said before stays.
    lines(folder, 0, 1)
    os.kill(pids[0], signal.SIGKILL)
    until = time.monotonic() + LONGEST_S
    while operated.watch()[0] is None and time.monotonic() < until:
        time.sleep(0.01)
    assert operated.watch() == [-signal.SIGKILL, 3]
    operated.restart(0)
    assert operated.watch() == [None, 3]
    again = run(operated, 0, "0", folder, WHO="another")
    assert again not in pids
    until = time.monotonic() + LONGEST_S
    while operated.watch()[0] is None and time.monotonic() < until:
        time.sleep(0.01)
    assert operated.watch() == [0, 3]
    assert lines(folder, 0, 2)[1].startswith("another ")
    # A program that is asked to end may stay; one that is killed does not.
    asked = [run(operated, 0, "wait", folder), run(operated, 1, "stay", folder)]
    lines(folder, 0, 3), lines(folder, 1, 3)
    for index in range(2):
        operated.call(index, "terminate")
    assert operated.watch(LONGEST_S) == [-signal.SIGTERM, None]
    assert is_alive(asked[1])
    operated.restart(1)
    assert not is_alive(asked[1])
    # Nothing outlives the end.
    left = [run(operated, i, "stay", folder) for i in range(2)]
    lines(folder, 1, 5)
    operated.stop()
    until = time.monotonic() + 20
    while any(map(is_alive, left)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, left))


def test_a_member_with_other_code_is_named(monkeypatch):
    made = local.Local()
    made.start([executor.Share()] * 3)
    facts = member.versions() | {"host": "far-away"}
    monkeypatch.setattr(
        made._members[2], "facts", lambda: facts | {"jax": "0.0.1"}, raising=False
    )
    told = (
        r"process 2 on far-away has jax 0\.0\.1, and this machine .*: install the same "
        "on all, or let them read the same folders"
    )
    with pytest.raises(executor.ExecutorError, match=told):
        made.check_same(3)


def test_cores_are_shared_without_overlap():
    assert local.divide([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert local.divide([3, 5], 2) == [[3], [5]]
    assert local.divide([3, 5], 3) == [[3, 5]] * 3
    assert local.divide([], 2) == [[], []]


def test_ray_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = "--executor=ray needs Ray, which is not there .*: install tlt-jax.ray., or "
    with pytest.raises(executor.ExecutorError, match=told):
        on_ray.OnRay()


@pytest.mark.ray
@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_is_not_there_or_too_small_is_said(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        executor.ExecutorError, match="^RAY_ADDRESS=127.0.0.1:1: Ray can"
    ):
        on_ray.OnRay()
    monkeypatch.delenv("RAY_ADDRESS")
    made = on_ray.OnRay()
    told = "^3 processes need 3000 CPU together, and the Ray cluster has "
    with pytest.raises(executor.ExecutorError, match=told):
        made.start([executor.Share(cpus=1000)] * 3)
    made.stop()


def descendants(pid):
    """Numbers of all processes that a process has begun, and they."""
    found = set()
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= {int(child)} | descendants(int(child))
    return found


def listening(pids):
    """Addresses at which these processes listen, as the system writes them."""
    inodes = set()
    for pid in pids:
        for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue  # Closed meanwhile.
    found = set()
    for name in ("tcp", "tcp6"):
        lines = pathlib.Path("/proc/net", name).read_text().splitlines()[1:]
        for words in map(str.split, lines):
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                found.add(words[1].partition(":")[0])
    return found


@pytest.mark.ray
@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_of_this_machine_listens_on_the_loopback_alone(monkeypatch):
    """In a process of its own: what Ray has read when it is imported, stays."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    program = (
        "import sys; from tlt_jax.executors import executor, on_ray; "
        "made = on_ray.OnRay(); made.start([executor.Share(cpus=0.5)]); "
        "print(made.host(0), flush=True); sys.stdin.read(); made.stop()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "127.0.0.1\n"
    found = listening({started.pid} | descendants(started.pid))
    started.communicate()
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}
    assert found and found <= loopback


@pytest.mark.ray
@needs_ray
def test_the_commands_that_begin_a_cluster_have_these_flags():
    """Those of docs/clusters.md: what they start needs more than one machine."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    printed = re.findall(r"ray symmetric-run (.+?) -- ", text)
    ray = pathlib.Path(sys.executable).with_name("ray")
    known = set()
    for command in ("start", "symmetric-run"):
        told = subprocess.run([ray, command, "--help"], capture_output=True, text=True)
        known |= set(re.findall(r"^  (--[a-z-]+)", told.stdout, re.M))
    assert len(printed) == 1
    for line in printed:
        assert set(re.findall(r"--[a-z-]+", line)) <= known, line
