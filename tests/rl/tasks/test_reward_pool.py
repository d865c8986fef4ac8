import math
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.foreign import process
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import generated, reward_pool, rewards
from tlt_jax.rl.update import advantages
from tlt_jax.runtime import failures

EXAMPLE = types.Example("e", "prompt", "4")

MODULE = """
import os, re, subprocess, sys, time
import numpy as np

def act(example, text):
    action, _, argument = text.partition(" ")
    if action == "number": return float(argument)
    if action == "sleep": time.sleep(float(argument)); return 1.0
    if action == "regex": re.match(r"(a+)+$", "a" * 40 + "b")
    if action == "raise": raise KeyError("lost")
    if action == "leave": sys.exit(3)
    if action == "die": os._exit(3)
    if action == "segfault": os.kill(os.getpid(), 11)
    if action == "pid": return float(os.getpid())
    if action == "fork":
        if os.fork() == 0:
            time.sleep(0.02)
            sys.exit(0)
        time.sleep(0.03)
        return float(argument)
    if action == "write":
        for fd in range(3, 4096):
            try: os.write(fd, eval(argument))
            except OSError: pass
        return 1.0
    if action == "close":
        os.closerange(3, 4096)
        time.sleep(60)
    if action == "stop": os.kill(os.getpid(), 19)
    if action == "big": return len("a" * 10**10)
    if action == "huge": return 10**int(argument)
    if action == "half": raise ValueError("half a \\ud83d and\\na line")
    if action == "mute":
        class Mute(Exception):
            def __str__(self): raise KeyError
        raise Mute
    if action == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(argument, "w") as out: out.write(str(child.pid))
        time.sleep(60)
    return {"nan": float("nan"), "inf": np.inf, "text": "1.0", "none": None,
            "array": np.ones(2), "true": True, "scalar": np.array(2.5)}[action]
"""


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_actions.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield rewards.named("user_actions:act")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(act):
    with reward_pool.RewardPool(
        act, num_workers=2, timeout_s=1.0, memory_mb=1024, failure_reward=-1.0
    ) as pool:
        yield pool


def with_paths():
    """Environment of a program that finds the package and the fixture's module."""
    paths = [pathlib.Path(reward_pool.__file__).parents[3], sys.path[0]]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def ends(pid):
    """Tell whether a process ends within seconds; zombies have ended."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return True
        time.sleep(0.02)
    return False


def score(pool, texts):
    return pool.score([(EXAMPLE, text) for text in texts])


FAILURES = {
    "raise": ("error", r"KeyError: 'lost' \(.*user_actions.py:10\)"),
    "leave": ("error", "SystemExit: 3"),
    "nan": ("nonfinite", "returned nan of type float: a finite number"),
    "inf": ("nonfinite", "returned inf"),
    "text": ("nonfinite", "returned '1.0' of type str"),
    "none": ("nonfinite", "returned None of type NoneType"),
    "number 1e39": ("nonfinite", r"returned 1e\+39 .* finite number .in float32."),
    "huge 400": ("nonfinite", "returned 1000.* of type int"),
    "huge 9999": ("nonfinite", "returned one beyond all bounds of type int"),
    "half": ("error", r"ValueError: half a \\ud83d and\\na line \("),
    "mute": ("error", "Mute: .its text raises KeyError."),
    "big": ("error", "MemoryError: .*; there is reward.memory_mb=1024"),
    "array": ("nonfinite", "of type ndarray"),
    "sleep 60": ("timeout", "more than timeout_s=1"),
    "regex": ("timeout", "more than timeout_s=1"),
    "die": ("crashed", "ended its process .exit code 3"),
    "segfault": ("crashed", "ended its process .signal SIGSEGV"),
    "stop": ("timeout", "more than timeout_s=1"),
    "close": ("crashed", "it closed the link to this process"),
    "write b'x'": ("crashed", "wrote into the link of its process"),
    "write b'x' * 999": ("crashed", "wrote into the link of its process"),
    "write bytes(16)": ("crashed", "wrote into the link of its process"),
}


def test_every_failure_becomes_a_value_and_nothing_is_lost(pool):
    texts = ["number 1", *FAILURES, "true", "scalar", "number 0.5"]
    scores = score(pool, texts)
    np.testing.assert_array_equal(
        scores.rewards, [1.0] + [-1.0] * len(FAILURES) + [1.0, 2.5, 0.5]
    )
    assert scores.rewards.dtype == np.float64
    for item, (status, message) in zip(
        scores.items[1:], FAILURES.values(), strict=False
    ):
        assert item.status == status
        assert re.search(message, item.message), item.message
    metrics = scores.metrics()
    assert metrics["reward/num_failed"] == len(FAILURES)
    counts = {"error": 5, "nonfinite": 8, "timeout": 3, "crashed": 6}
    for status, count in counts.items():
        assert metrics[f"reward/num_{status}"] == count
    assert 2.0 < metrics["reward/scoring_s"]
    assert 1.0 < metrics["reward/scoring_max_s"] < metrics["time/reward_s"] < 30
    assert "KeyError" in scores.first_failure()
    # And the pool goes on.
    assert score(pool, ["number 3"]).items[0].status == "ok"


def test_a_forked_child_never_serves(act):
    with reward_pool.RewardPool(act, 1, timeout_s=5.0) as pool:
        scores = score(pool, [f"fork {i}" for i in range(6)])
    np.testing.assert_array_equal(scores.rewards, range(6))
    assert scores.num_failed == 0


FORKS = """
from tlt_jax import types
from tlt_jax.rl.tasks import reward_pool, rewards
with reward_pool.RewardPool(rewards.named("user_actions:act"), 0) as pool:
    scores = pool.score([(types.Example("e", "", "4"), f"fork {i}") for i in range(3)])
    print(scores.rewards.tolist(), scores.num_failed, flush=True)
"""


def test_a_forked_child_does_not_go_on_with_the_run(act):
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        env=with_paths(),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[0.0, 1.0, 2.0] 0\n"


def test_an_answer_belongs_to_its_jobs_number():
    """Of a right form but of another number it is nobody's."""
    header = process.serving.HEADER
    one = process.Process("a test", "nowhere:", None, process.Limits(1.0))
    one._link, theirs = socket.socketpair()
    with theirs, one._link:
        for number, good in ((7, True), (6, False), (8, False)):
            one._number = 7
            theirs.sendall(header.pack(number, 1) + b"5")
            if good:
                assert one._exchange(b"", 1.0) == 5
            else:
                with pytest.raises(process.SpoiltError):
                    one._exchange(b"", 1.0)
                one._link.recv(1)


def test_rewards_are_not_rounded_to_float32(pool):
    scores = score(pool, ["number 16777216", "number 16777217", "number 0.1"])
    np.testing.assert_array_equal(scores.rewards, [16777216.0, 16777217.0, 0.1])
    found = advantages.estimate("dr_grpo", scores.rewards[:2].reshape(1, 2))
    np.testing.assert_array_equal(found, [[-0.5, 0.5]])


def test_order_is_that_of_submission(pool):
    delays = [0.3, 0.0, 0.1, 0.0, 0.0, 0.2]
    texts = [f"sleep {d}" if d else f"number {i}" for i, d in enumerate(delays)]
    got = score(pool, texts).rewards
    np.testing.assert_array_equal(got, [1, 1, 1, 3, 4, 1])


def test_scoring_runs_while_the_caller_is_busy(pool):
    score(pool, ["number 0"] * 2)
    pool.submit(EXAMPLE, "sleep 0.3")
    assert pool.submit(EXAMPLE, "sleep 0.3") == 1
    time.sleep(1.0)
    scores = pool.gather()
    assert scores.wait_s < 0.25
    assert scores.metrics()["reward/scoring_s"] >= 0.6
    assert pool.gather().rewards.shape == (0,)


def test_what_the_function_started_is_ended_with_it(pool, tmp_path):
    note = tmp_path / "pid"
    assert score(pool, [f"child {note}"]).items[0].status == "timeout"
    assert ends(int(note.read_text()))


def test_workers_end_with_the_pool_even_while_they_hang(act):
    with reward_pool.RewardPool(act, 1, timeout_s=60.0) as pool:
        pid = int(score(pool, ["pid"]).rewards[0])
        os.kill(pid, 0)
        pool.submit(EXAMPLE, "sleep 60")
        start = time.perf_counter()
    assert time.perf_counter() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="the reward pool is closed"):
        pool.submit(EXAMPLE, "pid")


ORPHANS = """
import os, signal, sys
from tlt_jax import types
from tlt_jax.rl.tasks import reward_pool, rewards
pool = reward_pool.RewardPool(rewards.named("user_actions:act"), 1, timeout_s=60)
pool.wait_until_ready()
pool.submit(types.Example("e", "", "4"), "child " + sys.argv[1])
while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read(): pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_a_killed_run(act, tmp_path):
    """Nor what a reward that is at work has started."""
    note = tmp_path / "pid"
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS, str(note)], env=with_paths(), timeout=60
    )
    assert done.returncode == -9
    assert ends(int(note.read_text()))


MAIN = """
import pathlib
from tlt_jax import types
from tlt_jax.foreign import process
from tlt_jax.rl.tasks import reward_pool, rewards
with pathlib.Path("runs").open("a") as runs: runs.write(__name__ + " ")
with reward_pool.RewardPool(rewards.named("exact"), num_workers=1) as pool:
    print(pool.score([(types.Example("e", "2+2?", "4"), "4")]).rewards[0])
"""


def test_workers_do_not_run_the_main_program_again(tmp_path):
    (tmp_path / "main.py").write_text(MAIN)
    root = pathlib.Path(reward_pool.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "1.0\n"
    assert (tmp_path / "runs").read_text() == "__main__ "


def test_a_task_scores_in_workers_as_here():
    task = tasks.ReasoningGymTask("products", style="cot", size=4)
    pairs = []
    for example in task.examples("train"):
        pairs += [(example, f"Answer: {example.answer}"), (example, "Answer: x")]
    with reward_pool.RewardPool(task.score, num_workers=1) as pool:
        np.testing.assert_array_equal(pool.score(pairs).rewards, [1.0, 0.0] * 4)


def test_in_process_scoring_turns_failures_into_values_too():
    def function(example, text):
        return {"ok": 1.0, "nan": math.nan}[text]

    with reward_pool.RewardPool(function, num_workers=0) as pool:
        scores = score(pool, ["ok", "nan", "raise"])
    np.testing.assert_array_equal(scores.rewards, [1.0, 0.0, 0.0])
    assert [i.status for i in scores.items] == ["ok", "nonfinite", "error"]


def test_of_several_functions_the_sum_counts_and_each_is_kept():
    def length(example, text):
        return {"inf": math.inf, "huge": 3e38}.get(text, len(text))

    names, functions = ("exact", "length"), (rewards.named("exact"), length)
    judge = rewards.WeightedSum(names, (1.0, 0.25), functions)
    with reward_pool.RewardPool(judge, 0, failure_reward=-1.0) as pool:
        scores = score(pool, ["4", "four", "inf"])
        assert [item.reward for item in scores.items] == [1.25, 1.0, -1.0]
        assert [item.parts for item in scores.items] == [
            {"exact": 1.0, "length": 1.0},
            {"exact": 0.0, "length": 4.0},
            {},
        ]
        row = scores.metrics()
        # The means of those that did not fail, unweighted.
        assert (row["reward/exact"], row["reward/length"]) == (0.5, 2.5)
        assert row["reward/num_nonfinite"] == row["reward/num_failed"] == 1
        told = "the reward function length returned inf of type float"
        assert scores.first_failure().startswith(told)
        row = score(pool, ["inf"]).metrics()
        assert row["reward/exact"] is row["reward/length"] is None
        both = reward_pool.joined([score(pool, ["4"]), score(pool, ["four"])])
        assert both.metrics()["reward/length"] == 2.5
    judge = rewards.WeightedSum(names, (1.0, 10.0), functions)
    with reward_pool.RewardPool(judge, 0) as pool:
        scores = score(pool, ["huge"])
    assert "functions' weighted sum returned 3e+39" in scores.first_failure()
    # One function with a weight is nothing that need be told apart.
    judge = rewards.WeightedSum(names[:1], (3.0,), functions[:1])
    with reward_pool.RewardPool(judge, 0) as pool:
        scores = score(pool, ["4"])
    assert scores.items[0].reward == 3.0 and scores.items[0].parts == {}
    assert "reward/exact" not in scores.metrics()


def test_threads_may_submit_at_once():
    task = generated.ArithmeticTask(size=50)
    with reward_pool.RewardPool(task.score, num_workers=0) as pool:
        seen = []

        def submit(examples):
            for example in examples:
                seen.append((pool.submit(example, example.answer), example))

        examples = task.examples("train")
        threads = [
            threading.Thread(target=submit, args=(examples[i::4],)) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(index for index, _ in seen) == list(range(50))
        assert pool.gather().rewards.sum() == 50


def test_a_worker_that_cannot_start_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "user_shy.py").write_text(
        "import os\n"
        f"if os.getpid() != {os.getpid()}: raise RuntimeError('not in workers')\n"
        "def fn(example, text): return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = rewards.named("user_shy:fn")
    with reward_pool.RewardPool(function, num_workers=1) as pool:
        for call in (pool.wait_until_ready, lambda: score(pool, ["x"])):
            with pytest.raises(failures.UserError) as raised:
                call()
            told = str(raised.value)
            assert told.startswith("a reward worker cannot start: ValueError: ")
            assert (
                "importing 'user_shy' fails with RuntimeError: not in workers" in told
            )
            assert told.endswith("by reward.workers=0.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": -1}, "num_workers=-1: give at least 1"),
        ({"timeout_s": 1e308}, r"timeout_s=1e\+308 is out of range"),
        ({"timeout_s": float("nan")}, "timeout_s=nan is out of range"),
        ({"timeout_s": 0.0}, "timeout_s=0.0 is out of range"),
        ({"memory_mb": -1}, "memory_mb=-1"),
        ({"failure_reward": 1e39}, r"failure_reward=1e\+39 is not finite"),
    ],
)
def test_what_a_pool_cannot_do_is_refused_at_once(act, changes, message):
    with pytest.raises(ValueError, match=message):
        reward_pool.RewardPool(act, **{"num_workers": 1, **changes})


def test_a_function_that_cannot_be_pickled_is_refused():
    with pytest.raises(ValueError, match="cannot be sent to workers .*num_workers=0"):
        reward_pool.RewardPool(lambda e, t: 1.0, num_workers=1)


def test_a_function_of_the_main_program_is_refused():
    def of_main(example, text):
        return 1.0

    of_main.__module__, of_main.__qualname__ = "__main__", "of_main"
    sys.modules["__main__"].of_main = of_main
    try:
        with pytest.raises(ValueError, match="defined in the main program or a note"):
            reward_pool.RewardPool(of_main, num_workers=1)
    finally:
        del sys.modules["__main__"].of_main
