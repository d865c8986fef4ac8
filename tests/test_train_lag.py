"""Runs whose rollouts go on while the learner updates: functions of their settings."""

import json
import shutil
import signal
import threading

import pytest

from tests import tiny_runs
from tlt_jax import assembly, train
from tlt_jax.executors import member
from tlt_jax.rl import collector
from tlt_jax.rl.update import experience
from tlt_jax.runtime import distributed, failures, stopping
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import schema
from tlt_jax.workdir import checkpoint, metrics, progress

decisive, policy, values = tiny_runs.decisive, tiny_runs.policy, tiny_runs.values
settings, start = tiny_runs.settings, tiny_runs.start

STEPS = 5
# Learning so fast that tokens of one policy are not those of the next.
LAG = {
    "rollout.lag": 1,
    "num_steps": STEPS,
    "optimizer.learning_rate": 1e-2,
    "checkpoint.every": 1,
    "checkpoint.keep": STEPS,
}
ADAPTED = {
    "specdec.mode": "tlt",
    "specdec.strategies": ("4:D2K1V3",),
    "specdec.ngram_strategies": (),
    "adaptation.row_tokens": 32,
    "adaptation.row_bases": 16,
    "adaptation.num_rows": 1,
    "adaptation.head_chunk": 16,
    "adaptation.max_steps": 1,
}
DIGESTS = ("rollout/tokens_digest", "policy/weights_digest")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.initial_model(tmp_path_factory)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """A run that others are compared with."""
    directory = tmp_path_factory.mktemp("base") / "run"
    start(model, directory, **LAG)
    return directory


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(train.plots, "draw_all", lambda directory: None)


def digests(rows):
    return [[row[name] for name in DIGESTS] for row in rows]


def test_the_record_says_how_old_the_weights_were(base):
    rows = metrics.read(base)
    assert values(rows, "rollout/lag") == [0, 1, 1, 1, 1]
    assert max(values(rows, "mismatch/logprob_max_abs")) < 1e-4
    assert values(rows, "policy/importance_mean")[0] == pytest.approx(1.0, abs=1e-6)
    for row in rows[1:]:
        assert abs(row["policy/importance_mean"] - 1) > 1e-4
        assert row["time/wait_s"] >= 0 and row["time/rollout_s"] > 0
    assert len({digest for digest, _ in digests(rows)}) == STEPS


def test_a_separate_worker_has_the_weights_of_its_rollout(
    base, model, tmp_path, monkeypatch
):
    """It stands in a thread here; as a process, see `test_launch_separate`.

    It trains a drafter, too, by which no token changes.
    """
    where = member.Member().address("127.0.0.1")
    for name, value in ((distributed.MEETING, where), (distributed.SECRET, "ab" * 32)):
        monkeypatch.setenv(name, value)
    changes = LAG | {"workers.placement": "separate"} | ADAPTED
    run = tiny_runs.config_of(**settings(model, **changes))
    monkeypatch.setenv(distributed.WORKER, "0")
    given = run, tmp_path, distributed.meeting()
    worker = threading.Thread(target=assembly.roll_out, args=given, daemon=True)
    worker.start()
    monkeypatch.delenv(distributed.WORKER)
    rows = start(model, tmp_path, **changes)
    assert digests(rows) == digests(metrics.read(base))
    assert policy(tmp_path) == policy(base)
    assert rows[-1]["workers/num_lost"] == 0
    updates = values(rows, "drafter/num_updates")
    assert updates == sorted(updates) and updates[0] >= 1
    assert rows[0]["drafter/texts"] > 0
    # It is told of the run's end.
    worker.join(20)
    assert not worker.is_alive()


def test_every_rollout_is_made_with_the_weights_of_its_age_and_no_other(
    base, model, tmp_path
):
    """Its tokens are those that a run without lag draws with the checkpoint's weights.

    Of step s those after step s - 2; of the first two the initial ones.
    """
    rows = metrics.read(base)
    run = tiny_runs.config_of(**settings(model, **LAG | {"rollout.lag": 0}))
    display = progress.Progress(run.num_steps, mode="off")
    with train.Trainer(run, tmp_path, display) as trainer:
        trainer.begin()
        learning, drawn = trainer.parts.updater, []
        initial = learning.train_state

        def digest_with(step, weights_step):
            state = initial
            if weights_step:
                params, _, _ = checkpoint.restore_policy(base, weights_step)
                state = initial.replace(params=params)
            learning.train_state = state
            trainer.rollouts.renew(step)
            made = trainer.parts.collector
            made.position = step * 4
            found = made.collect(step, watch_lib.Watch())
            return experience.tokens_digest(found.everything.completions)

        for step in range(STEPS):
            drawn.append(digest_with(step, max(step - 1, 0)))
        newest = digest_with(2, 2)
    assert drawn == values(rows, "rollout/tokens_digest")
    # Other weights would be seen.
    assert newest != drawn[2]


def test_two_runs_are_one_whoever_rolls_out_and_however(base, model, tmp_path):
    """With suffix matches and an evaluation in between; by one worker or two."""
    rows = metrics.read(base)[:3]
    short = LAG | {"num_steps": 3, "checkpoint.every": 0}
    drafts = {
        "specdec.mode": "ngram",
        "specdec.ngram_strategies": ("4:D3K2V5-ngram",),
        "specdec.tuner": "static",
        "eval.every": 2,
        "eval.num_prompts": 4,
    }
    again = start(model, tmp_path / "again", **short | drafts)
    assert digests(again[1:]) == digests(rows)
    assert values(again[1:], "reward/mean") == values(rows, "reward/mean")
    assert values(again[1:], "rollout/decode_steps") != values(
        rows, "rollout/decode_steps"
    )
    two = {"mesh.fsdp": 2, "rollout.max_batch": 2}
    one, both = (
        start(model, tmp_path / str(num), **short | two | {"workers.num": num})
        for num in (1, 2)
    )
    assert digests(one) == digests(both)
    assert values(one, "rollout/tokens_digest") == values(rows, "rollout/tokens_digest")
    for num in (1, 2):
        line = (tmp_path / str(num) / "timeline.jsonl").read_text().splitlines()[-1]
        assert len(json.loads(line)["workers"]) == num


def killed(directory, copy, step):
    """What a run that was killed behind its checkpoint of a step has left."""
    shutil.copytree(directory, copy)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / str(later))


def test_a_killed_run_goes_on_bit_for_bit(base, model, tmp_path):
    killed(base, tmp_path / "run", 2)
    record = checkpoint.newest_record(tmp_path / "run")["driver"]
    (waiting,) = record["rollouts"]["entries"]
    # The rollout of step 3 waits, its completions and no older weights.
    assert waiting["step"] == 2 and "weights" not in waiting
    assert record["arrays"]["2.tokens"][0] == [metrics.read(base)[2]["rollout/tokens"]]
    rows = start(model, tmp_path / "run", **LAG)
    assert decisive(rows) == decisive(metrics.read(base))
    assert policy(tmp_path / "run") == policy(base)
    for step in values(rows, "step"):
        assert tiny_runs.rollouts(tmp_path / "run", step) == tiny_runs.rollouts(
            base, step
        )


def test_a_rollout_that_is_given_up_is_made_with_its_own_weights_later(
    base, model, tmp_path, monkeypatch
):
    """That of the fourth step, whose weights are gone from the learner by then."""
    stop, whole, trainers = stopping.Stop(), collector.Collector.collect, []
    init = train.Trainer.__init__

    def remember(trainer, *arguments):
        trainers.append(trainer)
        init(trainer, *arguments)

    def ask(made, step, watch):
        if step == 3:
            stop.signal = signal.SIGTERM
            trainers[0].abandon()
        return whole(made, step, watch)

    with monkeypatch.context() as patch:
        patch.setattr(collector.Collector, "collect", ask)
        patch.setattr(train.Trainer, "__init__", remember)
        run = tiny_runs.config_of(**settings(model, **LAG | {"checkpoint.every": 0}))
        with pytest.raises(failures.Stopped, match="step 3 of 5 is saved"):
            train.train(run, tmp_path, stop)
    record = checkpoint.newest_record(tmp_path)["driver"]
    assert record["rollouts"]["entries"] == [{"step": 3, "weights": [2, 3]}]
    rows = start(model, tmp_path, **LAG | {"checkpoint.every": 0})
    assert decisive(rows) == decisive(metrics.read(base))
    assert policy(tmp_path) == policy(base)


def test_more_steps_are_added_to_a_finished_run_with_more_lag(model, tmp_path):
    """The last checkpoint has the weights of both rollouts that were not begun."""
    more = LAG | {"rollout.lag": 2, "checkpoint.every": 0, "num_steps": 4}
    start(model, tmp_path / "parts", **more | {"num_steps": 2})
    record = checkpoint.newest_record(tmp_path / "parts")["driver"]
    assert record["rollouts"]["entries"] == [
        {"step": 2, "weights": [0, 1]},
        {"step": 3, "weights": [1, 2]},
    ]
    rows = start(model, tmp_path / "parts", **more)
    whole = start(model, tmp_path / "whole", **more)
    assert values(rows, "rollout/lag") == [0, 1, 2, 2]
    assert decisive(rows) == decisive(whole)
    assert policy(tmp_path / "parts") == policy(tmp_path / "whole")


def test_recorded_logprobs_are_taken_on_request(base, model, tmp_path):
    given = {"learner.old_logprobs": "rollout", "num_steps": 3}
    rows = start(model, tmp_path, **LAG | given)
    assert values(rows, "mismatch/logprob_max_abs") == [None] * 3
    assert values(rows, "policy/importance_mean") == [1.0] * 3
    first = metrics.read(base)[:2]
    assert values(rows[:2], "rollout/tokens_digest") == values(
        first, "rollout/tokens_digest"
    )
    # From the first update on ratios are those to the policy that rolled out.
    assert rows[0]["policy/ratio_std"] < 1e-4 < rows[1]["policy/ratio_std"]


def test_lag_is_refused_where_no_rollout_can_go_on(model, tmp_path):
    with pytest.raises(schema.ConfigError) as raised:
        start(model, tmp_path / "split", **LAG, **{"mesh.tensor": 2})
    assert str(raised.value) == (
        "rollout.lag=1 with engines of 2 devices each: set rollout.tensor=1, or "
        "rollout.lag=0."
    )
    with pytest.raises(
        schema.ConfigError, match="rollout.lag=-1 is out of range: at l"
    ):
        tiny_runs.config_of(**{"rollout.lag": -1})
