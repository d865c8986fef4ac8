"""Runs with rollout workers in processes of their own, here threads of this one."""

import concurrent.futures
import contextlib

import pytest

from tests import tiny_runs
from tlt_jax import assembly, train
from tlt_jax.executors import member
from tlt_jax.runtime import distributed
from tlt_jax.settings import schema

# Learning so fast that tokens of one policy are not those of the next.
FAST = {"num_steps": 5, "optimizer.learning_rate": 1e-2, "checkpoint.every": 3}
EVALUATED = FAST | {"eval.every": 5, "eval.num_prompts": 8, "eval.temperature": 0.0}
SEPARATE = {"workers.placement": "separate", "workers.num": 2}
NAMES = ("step", "rollout/tokens_digest", "policy/weights_digest", "policy/loss")
NAMES += ("reward/mean", "rollout/lag", "eval/avg@1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.initial_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(train.plots, "draw_all", lambda directory: None)


@contextlib.contextmanager
def workers(monkeypatch, model, directory, **overrides):
    """Let the workers of these settings wait for a learner in this process."""
    where = member.Member().address("127.0.0.1")
    for name, value in ((distributed.MEETING, where), (distributed.SECRET, "ab" * 32)):
        monkeypatch.setenv(name, value)
    run = tiny_runs.config_of(**tiny_runs.settings(model, **overrides))
    with concurrent.futures.ThreadPoolExecutor(run.workers.num) as pool:
        ends = []
        for number in range(run.workers.num):
            monkeypatch.setenv(distributed.WORKER, str(number))
            given = run, directory, distributed.meeting()
            ends.append(pool.submit(assembly.roll_out, *given))
        monkeypatch.delenv(distributed.WORKER)
        yield
        for end in ends:
            end.result(20)


def told(rows):
    return [{name: row.get(name) for name in NAMES} for row in rows]


@pytest.mark.parametrize(
    "settings,more",
    [
        (EVALUATED, {"specdec.mode": "ngram"}),
        (FAST | {"rollout.lag": 1}, {}),
    ],
    ids=["turns", "lag"],
)
def test_digests_are_those_of_colocated_workers(
    monkeypatch, model, tmp_path, settings, more
):
    expected = tiny_runs.start(model, tmp_path / "colocated", **settings)
    assert len({row.get("rollout/tokens_digest") for row in expected} - {None}) == 5
    both = settings | SEPARATE | more
    with workers(monkeypatch, model, tmp_path / "separate", **both):
        found = tiny_runs.start(model, tmp_path / "separate", **both)
    assert told(found) == told(expected)
    assert tiny_runs.policy(tmp_path / "separate") == tiny_runs.policy(
        tmp_path / "colocated"
    )
    assert found[-1]["workers/num_lost"] == 0 and found[-1]["workers/idle_s"] > 0


def test_without_a_launcher_nobody_rolls_out(model, tmp_path):
    told = "'separate' in a process of its own: tlt_jax.launch starts the workers with"
    with pytest.raises(schema.ConfigError, match=told):
        tiny_runs.start(model, tmp_path / "run", **FAST, **SEPARATE)


@pytest.mark.parametrize(
    "overrides,told",
    [
        ({"specdec.mode": "tlt"}, "with specdec.mode=tlt: such workers use a trained"),
        (
            {"specdec.mode": "tlt", "adaptation.enabled": False},
            "Set adaptation.enabled=false and drafter.directory",
        ),
        (
            {"specdec.mode": "tlt", "specdec.rule": "rejection"},
            "with specdec.rule='rejection': its tokens would depend on which process",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides, told):
    with pytest.raises(schema.ConfigError, match=told):
        tiny_runs.config_of(**SEPARATE, **overrides)
    assert tiny_runs.config_of(**overrides).workers.placement == "colocated"
