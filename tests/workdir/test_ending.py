"""A run's end says where things are, and commands that are read as they stand."""

import importlib.util
import shlex

import pytest

from tests import command_lines, tiny_runs
from tlt_jax.runtime import failures
from tlt_jax.workdir import ending, metrics


@pytest.fixture
def directory(tmp_path):
    """A run of 127 steps that was stopped while it wrote its newest checkpoint."""
    directory = tmp_path / "my run"
    for name in ("60", "127", "130.orbax-checkpoint-tmp"):
        (directory / "checkpoints" / name).mkdir(parents=True)
    rows = '{"step": 0}\n{"step": 1, "reward/mean": 0.25}\n'
    rows += '{"step": 127, "reward/mean": 0.875}\n'
    (directory / metrics.FILE).write_text(rows)
    return directory


def test_a_stopped_run_says_where_it_is(directory, tmp_path):
    assert ending.stopped(directory, 200) == (
        f"stopped: step 127 of 200 is saved in {directory}/checkpoints/127; the same "
        "command resumes."
    )
    assert ending.stopped(tmp_path / "new", 200) == (
        f"stopped before a step was saved in {tmp_path}/new: the same command begins "
        "again."
    )


def test_a_run_is_complete_with_its_last_checkpoint(directory, tmp_path):
    run = tiny_runs.config_of(num_steps=127)
    assert ending.last_row(directory, run) == {"step": 127, "reward/mean": 0.875}
    assert ending.last_row(directory, tiny_runs.config_of(num_steps=128)) is None
    assert ending.last_row(tmp_path / "new", run) is None


@pytest.mark.parametrize(
    "rewards,last",
    [
        ([0.25], "0.250 in the last"),
        (8 * [0.0] + [0.5, 1.0], "0.750 over the last 2"),
        (50 * [0.0] + 9 * [1.0] + [0.5], "0.950 over the last 10"),
    ],
)
def test_the_last_reward_is_a_mean_where_there_are_steps(tmp_path, rewards, last):
    rows = [f'{{"step": {i + 1}, "reward/mean": {r}}}' for i, r in enumerate(rewards)]
    (tmp_path / metrics.FILE).write_text("\n".join(rows) + "\n")
    told = ending.finished(tmp_path, tiny_runs.config_of(num_steps=len(rewards)))
    assert told.splitlines()[0].endswith(f"in the first step, {last}")


def commands_of(told):
    lines = [line for line in told.splitlines() if " python -m " in line]
    return [shlex.split(line.partition("python -m ")[2]) for line in lines]


def test_what_can_be_done_next_is_done_by_these_commands(directory):
    run = tiny_runs.config_of(num_steps=127)
    told = ending.finished(directory, run)
    first, where, *_, last = told.splitlines()
    assert first == (
        "finished: step 127 of 127, reward 0.250 in the first step, 0.875 in the last"
    )
    assert where == f"  in        '{directory}': metrics.jsonl, plots, rollouts, " + (
        "checkpoints"
    )
    assert last == "  go on     the same command with --config.num_steps=254"
    commands = commands_of(told)
    assert [command[0].removeprefix("tlt_jax.") for command in commands] == [
        "report",
        "generate",
        "evaluate",
        "export",
    ]
    drafter = ending.drafter_finished(directory, 8)
    assert drafter.startswith("finished: step 8 of 8\n")
    commands += [c for c in commands_of(drafter) if "..." not in c]
    known = [command for command in commands if importlib.util.find_spec(command[0])]
    for command, result in zip(
        known, command_lines.start(known, stop=True), strict=True
    ):
        assert result.status == 0, (command, result.errors)


def test_updates_that_are_not_finite():
    error = failures.NotFiniteError("3 updates in a row were not finite")
    told = ending.not_finite(error, 5, 4)
    assert isinstance(told, failures.TrainingError)
    assert str(told) == (
        "3 updates in a row were not finite (step 6): lower optimizer.learning_rate or "
        "check the rewards and the weights, and begin again in another --workdir. The "
        "newest checkpoint is that of step 4; exported (tlt_jax.export) it is a model "
        "to begin from."
    )
    assert str(ending.not_finite(error, 0, None)).endswith("no checkpoint yet.")
