"""Runs of several real processes: every bit is that of one process (minutes)."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny_runs
from tlt_jax.runtime import distributed
from tlt_jax.workdir import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]


def command(directory, processes, *more):
    return [
        *(sys.executable, "-m", "tlt_jax.launch", f"--processes={processes}", "--"),
        *("--config=tests/tiny_runs.py", f"--workdir={directory}", *more),
    ]


def start(directory, processes, *more, **variables):
    return subprocess.Popen(
        command(directory, processes, *more),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(directory, processes, *more, **variables):
    started = start(directory, processes, *more, **variables)
    output, _ = started.communicate(timeout=240)
    return started.returncode, output


def children(pid):
    found = {}
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    for child in map(int, text.split()):
        variables = pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        name = f"{distributed.PROCESS}=".encode()
        for variable in variables:
            if variable.startswith(name):
                found[int(variable.removeprefix(name))] = child
    return found


# Compiles for its own device, as workers do, and for all, as the learner does; says how
# many programs it has asked for, and how many were found.
COMPILING = """
import collections, os, pathlib
import jax
import numpy as np
from tlt_jax.runtime import compile_cache, distributed, sharding

found = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: found.update([name]))
distributed.initialize()
compile_cache.enable()
with distributed.join() as group:
    own = jax.device_put(np.arange(8.0), jax.local_devices()[0])
    jax.jit(lambda x: x * x + 1)(own).block_until_ready()
    named = sharding.named(sharding.make_mesh(), sharding.ShardingRules(), ("batch",))
    whole = sharding.place(np.arange(4.0), named)
    assert float(jax.jit(lambda x: (x * x).sum())(whole)) == 14.0
    names = "compile_requests_use_cache", "cache_hits"
    counts = [found[f"/jax/compilation_cache/{name}"] for name in names]
    path = pathlib.Path(os.environ["COUNTS"], str(group.index))
    path.write_text(" ".join(map(str, counts)))
"""


@pytest.mark.slow
def test_who_starts_again_compiles_nothing(tmp_path):
    """Process 1 neither, of whose programs JAX by itself keeps none."""
    (tmp_path / "compiling.py").write_text(COMPILING)
    variables = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "COUNTS": str(tmp_path),
    }
    started = command(tmp_path / "run", 2)
    started.insert(started.index("--"), "--module=compiling")
    found = []
    for _ in range(2):
        subprocess.run(
            started, cwd=ROOT, env=os.environ | variables, check=True, timeout=240
        )
        texts = [(tmp_path / index).read_text() for index in "01"]
        found.append([tuple(map(int, text.split())) for text in texts])
    first, again = found
    assert all(asked > 2 and hits == 0 for asked, hits in first)
    assert again == [(asked, asked) for asked, _ in first]


@pytest.mark.slow
def test_what_is_wrong_with_the_settings_is_said_once(tmp_path):
    status, output = run(tmp_path, 2, "--config.num_step=3")
    assert status == 2
    errors = [line for line in output.splitlines() if "error" in line]
    assert errors == ["error: unknown config key 'num_step': did you mean 'num_steps'?"]


@pytest.mark.slow
def test_processes_share_a_run_that_survives_the_death_of_one(tmp_path):
    """Two processes, or one with two devices: every bit of the policy is the same."""
    settings = (
        *("--config.num_steps=40", "--config.mesh.data=-1", "--config.mesh.fsdp=1"),
        *("--config.checkpoint.every=5", "--config.eval.every=20"),
        *("--config.reward.functions=tests.judges:odd", "--config.log.plots_every=0"),
    )
    first = run(tmp_path / "model", 1, "--config.num_steps=1")
    assert first[0] == 0, first[1]
    settings += (f"--config.model.spec={tmp_path / 'model' / 'initial_model'}",)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    status, output = run(tmp_path / "one", 1, *settings, **devices)
    assert status == 0, output

    record = tmp_path / "killed" / metrics.FILE

    def started_until(num_rows):
        started, until = (
            start(tmp_path / "killed", 2, *settings),
            time.monotonic() + 200,
        )
        while not (record.exists() and record.read_text().count("\n") > num_rows):
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        return started

    started = started_until(3)
    started.send_signal(signal.SIGINT)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130, output
    step = metrics.read(tmp_path / "killed")[-1]["step"]
    where = f"{tmp_path}/killed/checkpoints/{step}; the same command resumes."
    assert output.splitlines()[-2:] == [
        "stopping after this step: saving; Ctrl-C again ends at once",
        f"stopped: step {step} of 40 is saved in {where}",
    ]

    started = started_until(11)
    started.send_signal(signal.SIGINT)
    started.communicate(timeout=60)
    shutil.copytree(tmp_path / "killed", tmp_path / "by_one")
    started = started_until(15)
    os.kill(children(started.pid)[1], signal.SIGKILL)
    output, _ = started.communicate(timeout=200)
    assert started.returncode == 0, output
    told = "process 1 of 2 was ended by signal SIGKILL: all are started again and go on"
    assert f"{told} from the checkpoint of step " in output
    status, output = run(tmp_path / "by_one", 1, *settings, **devices)
    assert status == 0, output
    names = ("step", "rollout/tokens_digest", "reward/mean", "policy/loss")
    names += ("policy/weights_digest",)
    expected = metrics.read(tmp_path / "one")
    assert len(expected) == 41 and any(n.startswith("eval/") for n in expected[0])
    for directory in ("killed", "by_one"):
        for row, wanted in zip(
            metrics.read(tmp_path / directory), expected, strict=True
        ):
            same = [n for n in wanted if n in names or n.startswith("eval/")]
            assert [row[n] for n in same] == [wanted[n] for n in same]
        assert tiny_runs.policy(tmp_path / directory) == tiny_runs.policy(
            tmp_path / "one"
        )


@pytest.mark.slow
def test_processes_share_a_drafter_that_one_of_them_trains(tmp_path):
    """The tokens are those without it; it goes on where a resumed run goes on."""
    settings = (
        *(
            "--config.mesh.data=-1",
            "--config.mesh.fsdp=1",
            "--config.log.plots_every=0",
        ),
        *("--config.reward.functions=tests.judges:odd", "--config.num_steps=12"),
    )
    adapted = (
        *("--config.specdec.mode=tlt", "--config.drafter.features=last"),
        *("--config.specdec.strategies=1:D2K1V3", "--config.adaptation.num_rows=2"),
        *("--config.specdec.ngram_strategies=1:D2K1V3-ngram",),
        *("--config.adaptation.row_tokens=32", "--config.adaptation.row_bases=16"),
        *("--config.adaptation.head_chunk=16",),
    )
    status, output = run(tmp_path / "model", 1, "--config.num_steps=1")
    assert status == 0, output
    settings += (f"--config.model.spec={tmp_path / 'model' / 'initial_model'}",)
    status, output = run(tmp_path / "off", 2, *settings)
    assert status == 0, output
    for num_steps in (8, 12):
        more = (*settings, *adapted, f"--config.num_steps={num_steps}")
        status, output = run(tmp_path / "tlt", 2, *more)
        assert status == 0, output
    rows, expected = (metrics.read(tmp_path / name) for name in ("tlt", "off"))
    for name in ("step", "rollout/tokens_digest", "policy/weights_digest"):
        assert tiny_runs.values(rows, name) == tiny_runs.values(expected, name)
    updates = tiny_runs.values(rows, "drafter/num_updates")
    assert updates == sorted(updates) and 0 < updates[7] <= updates[8]
    assert sum(tiny_runs.values(rows, "workers/trained_s")) > 0


@pytest.mark.slow
def test_processes_share_a_mixture_of_experts(tmp_path):
    """Experts of two processes, or of two devices of one: every bit is the same."""
    settings = (
        *("--config.num_steps=8", "--config.log.plots_every=0"),
        *("--config.pretrain.num_experts=4", "--config.pretrain.d_ff=32"),
        *("--config.mesh.fsdp=1", "--config.mesh.expert=2"),
    )
    plain = (*settings, "--config.num_steps=1", "--config.mesh.expert=1")
    status, output = run(tmp_path / "model", 1, *plain)
    assert status == 0, output
    settings += (
        f"--config.model.spec={tmp_path / 'model' / 'initial_model'}",
        # Only tasks as they come can teach the model made above.
        "--config.reward.functions=tests.judges:odd",
    )
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for name, processes, variables in (("one", 1, devices), ("two", 2, {})):
        status, output = run(tmp_path / name, processes, *settings, **variables)
        assert status == 0, output
    rows, expected = (metrics.read(tmp_path / name) for name in ("two", "one"))
    names = ("step", "rollout/tokens_digest", "policy/weights_digest", "policy/loss")
    for name in (*names, "moe/route_flips", "moe/load_balancing_loss"):
        assert tiny_runs.values(rows, name) == tiny_runs.values(expected, name), name
    assert set(tiny_runs.values(rows, "moe/route_flips")) == {0.0}
    assert tiny_runs.policy(tmp_path / "two") == tiny_runs.policy(tmp_path / "one")
