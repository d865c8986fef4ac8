import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import generated, reward_pool, rewards

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
        act, num_workers=2, timeout_s=1.0, failure_reward=-1.0
    ) as pool:
        yield pool


def score(pool, texts):
    return pool.score([(EXAMPLE, text) for text in texts])


FAILURES = {
    "raise": ("error", r"KeyError: 'lost' \(.*user_actions.py:10\)"),
    "leave": ("error", "SystemExit: 3"),
    "nan": ("nonfinite", "returned nan of type float: a finite number"),
    "inf": ("nonfinite", "returned inf"),
    "text": ("nonfinite", "returned '1.0' of type str"),
    "none": ("nonfinite", "returned None of type NoneType"),
    "array": ("nonfinite", "of type ndarray"),
    "sleep 60": ("timeout", "more than timeout_s=1"),
    "regex": ("timeout", "more than timeout_s=1"),
    "die": ("crashed", "ended its process .exit code 3"),
    "segfault": ("crashed", "ended its process .signal SIGSEGV"),
}


def test_every_failure_becomes_a_value_and_nothing_is_lost(pool):
    texts = ["number 1", *FAILURES, "true", "scalar", "number 0.5"]
    scores = score(pool, texts)
    np.testing.assert_array_equal(
        scores.rewards, [1.0] + [-1.0] * len(FAILURES) + [1.0, 2.5, 0.5]
    )
    assert scores.rewards.dtype == np.float32
    for item, (status, message) in zip(
        scores.items[1:], FAILURES.values(), strict=False
    ):
        assert item.status == status
        assert re.search(message, item.message), item.message
    metrics = scores.metrics()
    assert metrics["reward/num_failed"] == len(FAILURES)
    for status, count in (("error", 2), ("nonfinite", 5), ("timeout", 2)):
        assert metrics[f"reward/num_{status}"] == count
    assert metrics["reward/num_crashed"] == 2
    assert 2.0 < metrics["reward/scoring_s"]
    assert 1.0 < metrics["reward/scoring_max_s"] < metrics["time/reward_s"] < 30
    assert "KeyError" in scores.first_failure()
    # And the pool goes on.
    assert score(pool, ["number 3"]).items[0].status == "ok"


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
    child = pathlib.Path(f"/proc/{note.read_text()}/stat")
    for _ in range(100):  # Until its new parent has buried it.
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the function's own process still runs")


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


MAIN = """
import pathlib
from tlt_jax import types
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
        return {"inf": math.inf, "huge": 1e308}.get(text, len(text))

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
    assert "functions' weighted sum returned inf" in scores.first_failure()
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
    with (
        reward_pool.RewardPool(function, num_workers=1) as pool,
        pytest.raises(RuntimeError, match="cannot start: .*not in workers"),
    ):
        score(pool, ["x"])


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
