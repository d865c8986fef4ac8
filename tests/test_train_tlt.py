"""Whole runs with workers and an adaptive drafter: the same with all of it off."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest

from tests import command_lines, tiny_runs
from tlt_jax import evaluate, policy, train
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl.adaptation import adaptation, spot_trainer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.runtime import train_state
from tlt_jax.viz import timeline
from tlt_jax.workdir import drafter_checkpoint, metrics, progress

values = tiny_runs.values
BASE = {
    "num_steps": 4,
    "workers.num": 2,
    "mesh.data": 2,
    "drafter.features": "last",
    "adaptation.name": "eagle",
    "adaptation.row_tokens": 64,
    "adaptation.row_bases": 32,
    "specdec.tuner": "static",
    "specdec.strategies": ("2:D2K1V3",),
    "rollout.max_batch": 2,
    "specdec.ngram_strategies": (),
}
DECIDED = (
    *("rollout/tokens_digest", "reward/mean", "policy/loss", "policy/grad_norm"),
    "policy/weights_digest",
)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(train.plots, "draw_all", lambda directory: None)


@pytest.fixture(scope="module")
def off(tmp_path_factory):
    """The run without speculation that the others must equal."""
    directory = tmp_path_factory.mktemp("off") / "run"
    train.train(tiny_runs.config_of(**BASE), directory)
    return directory


def start(directory, **overrides):
    settings = BASE | {"specdec.mode": "tlt"} | overrides
    train.train(tiny_runs.config_of(**settings), directory)
    rows = metrics.read(directory)
    assert tiny_runs.unknown_keys(rows) == []
    return rows


def assert_same_run(directory, off):
    rows, wanted = metrics.read(directory), metrics.read(off)
    for name in DECIDED:
        assert values(rows, name) == values(wanted, name)
    assert tiny_runs.policy(directory) == tiny_runs.policy(off)


@pytest.fixture
def waits(monkeypatch):
    """The first worker waits for the other's answers long enough to train."""
    decode_call, check = engine_lib.Engine._decode_call, train_state.Skips.check
    stepped = threading.Event()

    def slow(engine, plan, *rest):
        if engine.mesh.devices.flat[0].id:
            stepped.wait(1.0)
            stepped.clear()
        return decode_call(engine, plan, *rest)

    def checked(skips, remedy=""):
        check(skips, remedy)
        # The drafter's training names a remedy, the policy's does not.
        if remedy:
            stepped.set()

    monkeypatch.setattr(engine_lib.Engine, "_decode_call", slow)
    monkeypatch.setattr(train_state.Skips, "check", checked)


@pytest.fixture
def seen(monkeypatch):
    """What a display would have shown of the workers."""
    found, within = [], progress.Progress.within

    def watched(display, *given):
        found.append(display._look())
        within(display, *given)

    monkeypatch.setattr(progress.Progress, "within", watched)
    return found


def test_everything_on_is_everything_off(off, tmp_path, waits, seen):
    rows = start(tmp_path, **{"adaptation.publish_steps": 2})
    shown = {str(workers) for workers in seen if workers is not None}
    assert any(text.startswith("2 busy, 0 training, 0 idle") for text in shown)
    drafted = tiny_runs.rollouts(tmp_path, 4)
    assert any(one["drafted"] for one in drafted)
    assert_same_run(tmp_path, off)
    assert values(rows, "drafter/num_updates")[-1] > 4
    versions = values(rows, "drafter/version")
    assert versions == sorted(versions) and versions[-1] > 2
    assert max(values(rows, "specdec/accept_length")) > 1
    assert set(values(rows, "specdec/rule")) == {"keyed"}
    for row in rows:
        assert metrics.NAMES <= row.keys()
        assert 0 <= row["workers/trained_s"] <= row["workers/idle_s"]
        # Steps there were, of every one that waited long enough.
        assert (row["drafter/num_steps"] > 0) == (row["workers/trained_s"] > 0)
    assert sum(values(rows, "workers/trained_s")) > 0
    drawn = timeline.read(tmp_path)
    assert [record["step"] for record in drawn] == [1, 2, 3, 4]
    kinds = {i[0] for r in drawn for w in r["workers"] for i in w["intervals"]}
    assert kinds == {"busy", "idle", "training"}


def test_suffix_matches_alone_change_nothing_either(off, tmp_path):
    start(
        tmp_path,
        **{"specdec.mode": "ngram", "specdec.ngram_strategies": ("4:D2K1V3-ngram",)},
    )
    assert_same_run(tmp_path, off)


@pytest.mark.parametrize("architecture", ["tlt", "block"])
def test_one_worker_trains_between_rollout_and_update(off, tmp_path, architecture):
    settings = {"adaptation.max_frac": 1.0, "drafter.architecture": architecture}
    rows = start(tmp_path, **{"workers.num": 1}, **settings)
    assert_same_run(tmp_path, off)
    assert sum(values(rows, "drafter/num_steps")) > 0
    assert (
        0 < sum(values(rows, "drafter/train_s")) < sum(values(rows, "time/drafter_s"))
    )
    assert sum(values(rows, "workers/trained_s")) == 0


def test_steps_between_rollout_and_update_can_be_counted(off, tmp_path):
    settings = {"adaptation.max_frac": 1e6, "adaptation.max_steps": 3}
    rows = start(tmp_path, **{"workers.num": 1, **settings})
    assert_same_run(tmp_path, off)
    # Or none, where training does not pay.
    assert {3} <= set(values(rows, "drafter/num_steps")) <= {0, 3}


@pytest.fixture(scope="module")
def chained(off, tmp_path_factory):
    """The settings of a run by a chain rule, and such a run, by the rule `block`.

    Its drafter is there from the beginning and is trained by counted steps, on the
    model of `off`.
    """
    directory = tmp_path_factory.mktemp("chained")
    model = off / "initial_model"
    cfg = drafter.of_target(policy.load(str(model)).config, output_norm=False)
    drafter_io.save(directory / "drafter", drafter.init(cfg, jax.random.key(0)), cfg)
    settings = {
        "model.spec": str(model),
        "drafter.directory": str(directory / "drafter"),
        "workers.num": 1,
        "mesh.data": 1,
        "adaptation.max_steps": 2,
        # Less than a step takes.
        "adaptation.max_frac": 1e-9,
        "adaptation.learning_rate": 1e-2,
        "specdec.rule": "block",
        "eval.every": 4,
        "eval.num_prompts": 24,
        "eval.samples": 2,
        "eval.k": (1, 2),
        "reward.functions": (tiny_runs.ODD,),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.plots, "draw_all", lambda directory: None)
        start(directory / "run", **settings)
    return settings, directory / "run"


def test_a_chain_rule_draws_tokens_of_its_own_and_is_recorded(off, chained):
    _, directory = chained
    rows, wanted = metrics.read(directory)[1:], metrics.read(off)
    assert values(rows, "specdec/rule") == ["block"] * 4
    assert all("specdec/rule" not in row for row in wanted)
    config = json.loads((directory / "config.json").read_text())
    assert config["specdec"]["rule"] == "block"
    assert min(values(rows, "specdec/accept_length")) > 1
    assert max(values(rows, "mismatch/logprob_max_abs")) < 1e-4
    first = [run[0]["rollout/tokens_digest"] for run in (rows, wanted)]
    assert first[0] != first[1]
    for row in rows:
        accepted, verified = row["specdec/rank_accepted"], row["specdec/rank_verified"]
        assert sum(accepted) == sum(row["specdec/num_accepted"][1:]) <= sum(verified)
        assert all(a <= v for a, v in zip(accepted, verified, strict=True))
    # Training heeds no clock.
    assert values(rows, "drafter/num_steps") == [2] * 4


def test_a_chain_rules_run_goes_on_bit_for_bit(chained, tmp_path, capsys):
    settings, whole = chained
    # As one that was killed in its last step.
    shutil.copytree(whole, tmp_path / "run")
    for folder in ("checkpoints", "drafter_checkpoints"):
        shutil.rmtree(tmp_path / "run" / folder / "4")
    start(tmp_path / "run", **settings, **{"log.progress": "plain"})
    said = capsys.readouterr().out
    assert "resuming after step 2 of 4" in said
    assert "specdec.rule" not in said
    rows, wanted = metrics.read(tmp_path / "run"), metrics.read(whole)
    for name in ("drafter/version", "policy/weights_digest"):
        assert len(set(values(wanted[1:], name))) == 4
    assert tiny_runs.decisive(rows) == tiny_runs.decisive(wanted)
    assert tiny_runs.policy(tmp_path / "run") == tiny_runs.policy(whole)
    kept = [tiny_runs.rollouts(run, 4) for run in (tmp_path / "run", whole)]
    assert kept[0] == kept[1]


def test_a_block_drafters_run_goes_on_bit_for_bit(off, tmp_path):
    """Of trees that it sampled."""
    settings = {
        "specdec.strategies": ("2:D2K2V5",),
        "model.spec": str(off / "initial_model"),
        "drafter.architecture": "block",
        "workers.num": 1,
        "mesh.data": 1,
        "adaptation.max_steps": 2,
        "adaptation.max_frac": 1e-9,
        "specdec.rule": "rejection",
    }
    start(tmp_path / "whole", **settings)
    # As one that was killed in its last step.
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for folder in ("checkpoints", "drafter_checkpoints"):
        shutil.rmtree(tmp_path / "run" / folder / "4")
    start(tmp_path / "run", **settings)
    rows, wanted = (metrics.read(tmp_path / name) for name in ("run", "whole"))
    assert values(rows, "drafter/num_updates") == [2, 4, 6, 8]
    assert min(values(rows, "specdec/accept_length")[1:]) > 1
    assert tiny_runs.decisive(rows) == tiny_runs.decisive(wanted)
    drafters = [
        drafter_checkpoint.restore_weights(tmp_path / name)[1]
        for name in ("run", "whole")
    ]
    assert drafters[0].block.masks.shape[0] == 1
    jax.tree.map(np.testing.assert_array_equal, *drafters)


def test_under_a_chain_rule_evaluations_keep_the_tokens(chained):
    _, directory = chained
    status, out, errors = command_lines.in_process(evaluate, f"--model={directory}")
    assert status == 0, errors
    found, recorded = json.loads(out), metrics.read(directory)[-1]
    assert 0 < found["avg@2"] < 1
    for name in ("avg@2", "pass@1", "pass@2"):
        assert found[name] == recorded[f"eval/{name}"]


def test_what_clocks_decide_is_said_at_the_start(chained, tmp_path, capsys):
    settings, _ = chained
    changes = {"num_steps": 1, "eval.every": 0, "log.progress": "plain"}
    changes |= {"specdec.tuner": "beg_mab", "specdec.rule": "rejection"}
    changes |= {"specdec.strategies": ("2:D2K1V3,D2K2V5",)}
    (row,) = start(tmp_path, **settings | changes)
    assert row["specdec/rule"] == "rejection"
    said = capsys.readouterr().out
    assert said.count("specdec.rule='rejection' keeps the law of tokens and not") == 1
    assert "as specdec.tuner='beg_mab' is told seconds" in said
    assert f"accept {row['specdec/accept_length']:.2f} (rejection)" in said


def test_a_resumed_run_takes_the_drafter_up_bit_for_bit(
    off, tmp_path, waits, monkeypatch
):
    """Also with another number of workers."""
    first = start(tmp_path, num_steps=2)
    restored = []
    restore = adaptation.Adaptation.restore

    def watched(self, *given):
        restore(self, *given)
        state = self.state()
        restored.append(
            (self.learner.num_updates, self.version, state.arrays, state.meta)
        )

    monkeypatch.setattr(adaptation.Adaptation, "restore", watched)
    rows = start(tmp_path, **{"workers.num": 1})
    assert_same_run(tmp_path, off)
    num_updates, version, arrays, meta = restored[0]
    assert num_updates == first[-1]["drafter/num_updates"] > 0
    assert version == first[-1]["drafter/version"]
    assert rows[2]["drafter/num_updates"] >= num_updates
    assert arrays.keys() and meta["is_ready"]


def test_a_drafter_that_diverges_is_rolled_back_and_the_run_goes_on(
    off, tmp_path, waits, capsys, monkeypatch
):
    monkeypatch.setattr(spot_trainer, "_MAX_SKIPPED", 1)
    rows = start(
        tmp_path,
        **{"adaptation.learning_rate": 1e30, "log.progress": "plain"},
    )
    assert_same_run(tmp_path, off)
    failed = [row for row in rows if "drafter/failure" in row]
    assert failed and "not finite: lower" in failed[0]["drafter/failure"]
    assert "was undone" in capsys.readouterr().out


def test_a_worker_that_dies_costs_time_alone(off, tmp_path, monkeypatch, capsys):
    decode_call = engine_lib.Engine._decode_call

    def dying(engine, *rest):
        if engine.version == 3 and engine.mesh.devices.flat[0].id:
            raise MemoryError("no room")
        return decode_call(engine, *rest)

    monkeypatch.setattr(engine_lib.Engine, "_decode_call", dying)
    rows = start(tmp_path, **{"log.progress": "plain"})
    assert_same_run(tmp_path, off)
    assert values(rows, "workers/num_lost") == [0, 0, 1, 1]
    assert rows[-1]["workers/lost"] == "1 (MemoryError: no room)"
    assert "step 3: lost workers: 1 (MemoryError: no room)" in capsys.readouterr().out
