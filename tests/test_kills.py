"""The kill campaign: what it compares, and that it would see a loss."""

import json
import re
import signal
import subprocess
import sys

import pytest

from tests import kills, run_facts


def campaign(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.kills", *arguments],
        cwd=kills.ROOT,
        capture_output=True,
        text=True,
    )


def test_seeds_go_through_every_moment_and_name_one_plan():
    for name, kind in kills.KINDS.items():
        plans = [kills.plan(name, seed, 4.0) for seed in range(len(kind.moments))]
        assert [plan.kills[0][0] for plan in plans] == list(kind.moments)
        assert plans[3] == kills.plan(name, 3, 4.0) != kills.plan(name, 4, 4.0)
        for plan in plans:
            for moment, kill in plan.kills:
                assert kill.where == kind.moments[moment][0]
                assert 1 <= kill.nth <= kind.moments[moment][1]
                assert 0 <= kill.process < kind.processes
    numbers = {kill.number for plan in plans for _, kill in plan.kills}
    assert numbers == {signal.SIGKILL, signal.SIGTERM}


def test_every_moment_is_a_function_of_the_package():
    for kind in kills.KINDS.values():
        for where, _ in kind.moments.values():
            if where:
                owner, name = kills.killed_starts.find(where)
                assert callable(getattr(owner, name))


def test_a_start_begins_with_the_rollout_that_its_checkpoint_lacks():
    made, given_up = {"step": 4, "rolled": {}}, {"step": 5, "weights": [4, 4]}
    for entries, first in (
        ([], 4),
        ([made], 5),
        ([made, given_up], 5),
        ([given_up | {"step": 4}, given_up], 4),
        ([made, made | {"step": 5}], 6),
    ):
        assert kills.first_rollout({"rollouts": {"entries": entries}}, 4) == first
    # Without lag nothing waits.
    assert kills.first_rollout({"parts": {}}, 4) == 4
    assert kills.first_rollout({}, 0) == 0


def test_what_differs_is_named():
    wanted = {"left over": [], "row 1 a": 1, "row 2 drafter/b": 2, "steps": [1, 2]}
    assert run_facts.differences(wanted, wanted) == []
    found = {"left over": ["x.part"], "row 2 drafter/b": 3, "steps": [1, 1, 2, 3]}
    assert run_facts.differences(found, wanted, "row . drafter/") == [
        "left over: x.part",
        "row 1 a: absent instead of 1",
        "steps: [3] instead of []",
    ]
    assert "row 2 drafter/b: 3 instead of 2" in run_facts.differences(found, wanted)


def test_facts_of_a_directory(tmp_path):
    (tmp_path / "rollouts").mkdir()
    for name in (".initial_model.x1", "config.json.partial", "plots"):
        (tmp_path / name).mkdir()
    (tmp_path / "rollouts" / "step_000002.part").touch()
    lines = [{"tokens": [7, 8], "drafted": [[0, 1]]}, {"tokens": [9], "drafted": None}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "rollouts" / "step_000002.jsonl").write_text(text)
    rows = '{"step": 2, "a": "c", "time/step_s": 1.5}\n' * 2
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert run_facts.of(tmp_path) == {
        "left over": [
            ".initial_model.x1",
            "config.json.partial",
            "rollouts/step_000002.part",
        ],
        "files": ["metrics.jsonl", "plots", "rollouts", "rollouts/step_000002.jsonl"],
        "steps": [2, 2],
        "row 2 step": 2,
        "row 2 a": "c",
        "rollouts 2": [{"tokens": [7, 8]}, {"tokens": [9]}],
        "rollouts 2 drafted": [[[0, 1]], None],
    }


@pytest.mark.slow
def test_a_state_that_is_not_restored_is_noticed():
    """The run is killed in its sixth rollout and draws the first prompts again."""
    told = campaign(
        *("--cycles=1", "--kinds=off", "--seed=401"),
        "--without=tlt_jax.rl.collector:Collector.restore",
    )
    assert told.returncode == 1, told.stdout + told.stderr
    assert "rollout/tokens_digest: " in told.stdout
    again = "python -m tests.kills --cycles=1 --seed=401 --kinds=off"
    assert again in told.stdout
    assert "| off | rollout | 1 | 1 | 0 |" in told.stdout


@pytest.mark.slow
def test_runs_that_are_killed_are_those_that_are_not():
    told = campaign("--cycles=10")
    assert told.returncode == 0, told.stdout + told.stderr
    assert re.search(r"^10 cycles, \d+ kills, 0 different; ", told.stdout, re.M)
