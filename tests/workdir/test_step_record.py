"""The record of a step: names that stay, and what follows from counts, in numbers."""

import json
import types as python_types

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.update import experience
from tlt_jax.workdir import metrics, step_record

SECONDS = {
    "time/rollout_s": 4.0,
    "time/reward_s": 0.5,
    "time/inference_s": 0.0,
    "time/update_s": 2.0,
    "time/sync_s": 0.25,
    "time/compile_s": 8.0,
}
SAID = {"rollout/tokens": 300, "policy/loss": -0.5, "own/name": [1, 2]}


@pytest.fixture(autouse=True)
def now(monkeypatch):
    """A clock that stands at 120 seconds."""
    fake = python_types.SimpleNamespace(perf_counter=lambda: 120.0)
    monkeypatch.setattr(step_record, "time", fake)


def test_what_nobody_has_said_has_a_value_of_its_own():
    row = step_record.complete(SAID, 7, SECONDS, 100.0)
    assert row == SECONDS | SAID | {
        "step": 7,
        "time/step_s": 20.0,
        # By the rollout's seconds alone.
        "rollout/tokens_per_s": 75.0,
        "specdec/accept_length": 1.0,
        "specdec/accept_rate_by_depth": [],
        "specdec/strategy": "none",
        "workers/idle_s": 0.0,
        "workers/trained_s": 0.0,
        "workers/idle_frac": 0.0,
    } | dict.fromkeys(
        """
        reward/mean reward/std reward/zero_std_frac
        length/mean length/p50 length/p95 length/max length/clipped_frac
        policy/entropy policy/kl policy/clip_frac policy/grad_norm
        mismatch/logprob_max_abs
        drafter/version drafter/loss drafter/top1_acc
        rollout/tokens_digest
        """.split()
    )
    assert row.keys() - SAID.keys() == metrics.NAMES - SAID.keys()


def test_an_evaluation_that_was_given_up_is_missing(tmp_path):
    assert step_record.left_out(tmp_path, 0) == {"step": 0}
    (tmp_path / metrics.FILE).write_text('{"step": 1, "a/b": 2}\n')
    assert step_record.left_out(tmp_path, 1) == {"step": 1, "a/b": 2}
    assert step_record.left_out(tmp_path, 2) is None
    (tmp_path / metrics.FILE).write_text('{"step": 1, "eval/avg@2": 0.5}\n')
    assert step_record.left_out(tmp_path, 1) is None
    (tmp_path / metrics.FILE).write_text("")
    assert step_record.left_out(tmp_path, 1) is None


def test_what_was_said_stays():
    said = {
        "rollout/tokens": 1,
        "specdec/strategy": "4:D3K1V4",
        "workers/idle_frac": 0.75,
        "drafter/version": 3,
    }
    row = step_record.complete(said, 1, SECONDS, 1.0)
    assert {name: row[name] for name in said} == said


def test_acceptance_follows_from_counts():
    # Eight row-steps; two of them drafted one token and the others three.
    said = SAID | {
        "specdec/num_accepted": [8, 6, 3, 1],
        "specdec/num_tried": [8, 4, 2],
        # Whatever others made of the counts of a part of the engines.
        "specdec/accept_length": 9.0,
    }
    row = step_record.complete(said, 1, SECONDS, 1.0)
    assert row["specdec/accept_length"] == (8 + 6 + 3 + 1) / 8
    assert row["specdec/accept_rate_by_depth"] == [6 / 8, 3 / 4, 1 / 2]
    assert row["specdec/num_accepted"] == [8, 6, 3, 1]
    nothing = SAID | {"specdec/num_accepted": [], "specdec/num_tried": []}
    row = step_record.complete(nothing, 1, SECONDS, 1.0)
    assert row["specdec/accept_length"] == 1.0
    assert row["specdec/accept_rate_by_depth"] == []


def test_a_step_in_no_time_has_a_speed():
    row = step_record.complete(SAID, 1, SECONDS | {"time/rollout_s": 0.0}, 0.0)
    assert row["rollout/tokens_per_s"] == pytest.approx(300 / 1e-9)


# printf '\7\0\0\0\3\0\0\0\5\0\0\0\2\0\0\0\4\2\0\0\1\0\0\0' | sha256sum
DIGEST = "b4ed06a0d89134923884ca14a5503fc9a5a98921763b37fe7353b30c38c9eec6"


def completion(number, *tokens):
    tokens = np.array(tokens, np.int32)
    logprobs = np.zeros(len(tokens), np.float32)
    return types.Completion(number, tokens, logprobs, "length" if number else "eos")


def test_a_steps_completions_reach_the_file(tmp_path):
    """The digest is of the tokens as they were drawn, in the order of requests."""
    drawn = [completion(0, 7, 3, 5), completion(1, 2, 516, 1)]
    rewards = np.array([[0.25, 0.75]])
    said = experience.reward_and_length_row(rewards, drawn)
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(step_record.complete(said, 1, SECONDS, 20.0))
    written = json.loads((tmp_path / metrics.FILE).read_text())
    assert written["rollout/tokens_digest"] == DIGEST
    assert written["length/clipped_frac"] == 0.5 and written["reward/std"] == 0.25
    # Not of sorted tokens, nor of completions in another order.
    for others in (
        [completion(0, 3, 5, 7), completion(1, 1, 2, 516)],
        drawn[::-1],
        [completion(0, 7, 3, 5), completion(1, 1, 2, 516)],
        # Nor of ones that end a token earlier or later.
        [completion(0, 7, 3), completion(1, 2, 516, 1)],
        [completion(0, 7, 3, 5), completion(1, 2, 516, 1, 0)],
    ):
        assert experience.tokens_digest(others) != DIGEST
