"""Experiments on small runs: their mains with tiny settings, and what they conclude."""

import json

import pytest

from experiments import (
    active_batch,
    lag,
    length_tail,
    losslessness,
    ngram_start,
    objectives,
    program_pool,
    reward_curves,
)
from experiments.lab import recipes, tables
from tlt_jax import train_drafter

RECIPE = "tests/tiny_runs.py"


def lossless(options):
    """Compares matches with nothing."""
    summary = losslessness.main([*options, "--steps=2", "--arms=ngram"])
    assert [row["arm"] for row in summary] == ["off", "ngram"]
    off, ngram = summary
    assert off["steps_differing"] == ngram["steps_differing"] == 0
    assert off["tokens"] == ngram["tokens"] > 0


@pytest.mark.slow
def test_tokens_of_real_runs_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(losslessness, "TEMPERATURES", {1.0: ()})
    lossless([f"--out={tmp_path}", f"--config={RECIPE}"])


def test_tokens_are_compared_over_arms(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(losslessness, "TEMPERATURES", {1.0: ()})
    options = [f"--out={tmp_path}"]
    lossless(options)
    rows = tables.read(tmp_path / "losslessness.csv")
    rows[-1]["tokens_digest"] = "another"
    assert losslessness.summary_of(rows)[1]["steps_differing"] == 1
    with pytest.raises(ValueError, match="gone"):
        losslessness.main([*options, "--arms=gone"])


@pytest.fixture
def runs(monkeypatch):
    """Records as runs would leave them, without the runs."""

    def run(recipe, overrides):
        on = overrides["specdec.mode"] != "off"
        matches = bool(overrides.get("specdec.ngram_strategies"))
        return [
            {
                "step": step,
                "reward/mean": 0.1 * step + 0.01 * overrides["seed"],
                "policy/loss": 0.5,
                "rollout/tokens": 100,
                "rollout/tokens_digest": f"{overrides['seed']}/{step}",
                "rollout/decode_steps": 10,
                "mismatch/logprob_max_abs": 1e-6,
                "rollout/row_steps": 50 if on and (matches or step > 1) else 100,
                "specdec/accept_length": 2.0 if on else 1.0,
                "drafter/ready": int(on),
            }
            for step in range(1, overrides["num_steps"] + 1)
        ]

    def planned(settings, trains):
        del trains
        specdec = settings.specdec
        asked = {
            "specdec.mode": specdec.mode,
            "specdec.ngram_strategies": specdec.ngram_strategies,
        }
        asked |= {"seed": settings.seed, "num_steps": settings.num_steps}
        return run("", asked)

    monkeypatch.setattr(recipes, "run", run)
    monkeypatch.setattr(recipes, "run_planned", planned)
    return run


def test_reward_curves_are_compared_step_by_step(tmp_path, runs, monkeypatch):
    options = [f"--out={tmp_path}", "--steps=4", "--seeds=2"]
    summary = reward_curves.main(options)
    assert [row["steps_differing"] for row in summary] == [0, 0]
    assert (tmp_path / "reward_curves.png").stat().st_size > 10_000
    rows = tables.read(tmp_path / "reward_curves.csv")
    rows[-1]["reward"] += 0.25
    changed = reward_curves.summary_of(rows)
    assert changed[1]["steps_differing"] == 1
    assert changed[1]["reward_gap_max"] == pytest.approx(0.25)


def test_lags_are_compared_seed_by_seed(tmp_path, monkeypatch):
    """With lag 1 a step is half as long, by one seed; by the other twice as long."""

    def run(recipe, overrides):
        number, seed = overrides["rollout.lag"], overrides["seed"]
        lagging = {"rollout/lag": number, "time/wait_s": 0.5} if number else {}
        return [
            {
                "step": step,
                "reward/mean": 0.01 * step + 0.1 * number,
                "rollout/tokens": 100,
                "rollout/tokens_digest": "",
                "time/step_s": 4.0 * (0.5, 2.0)[seed] if number == 1 else 4.0,
                "time/rollout_s": 3.0,
                **lagging,
            }
            for step in range(1, overrides["num_steps"] + 1)
        ]

    monkeypatch.setattr(recipes, "run", run)
    options = [f"--out={tmp_path}", "--steps=20", "--warm-steps=2", "--seeds=2"]
    none, one, two = lag.main(options)
    assert [row["lag"] for row in (none, one, two)] == [0, 1, 2]
    assert one["times_faster"] == pytest.approx(1.0) == two["times_faster"]
    assert none["wait_s"] == 0 and one["wait_s"] == 0.5 and one["rollout_s"] == 3
    # The last ten steps: 0.11 to 0.2.
    assert none["reward_last"] == pytest.approx(0.155)
    assert one["reward_last_max"] == pytest.approx(0.255)
    assert (tmp_path / "lag.png").stat().st_size > 10_000
    rows = tables.read(tmp_path / "lag.csv")
    assert len(rows) == 3 * 2 * 20 and {row["age"] for row in rows} == {0, 1, 2}
    _, slower, _ = lag.main([*options, "--again", "--seeds=1"])
    assert slower["times_faster"] == pytest.approx(2.0)


def test_suffix_matches_count_before_the_drafter_is_ready(tmp_path, runs):
    summary = ngram_start.main([f"--out={tmp_path}", "--steps=3", "--seeds=2"])
    found = {row["system"]: row for row in summary}
    assert found["drafter"]["early_steps"] == found["drafter"]["seeds"] == 2
    assert found["drafter"]["early_tokens_per_row_step"] == 1
    assert found["matches, then drafter"]["early_tokens_per_row_step"] == 2
    assert found["drafter"]["tokens_per_row_step"] == pytest.approx(300 / 200)
    assert (tmp_path / "ngram_start.png").stat().st_size > 10_000
    rows = tables.read(tmp_path / "ngram_start.csv")
    for row in rows:
        row["row_steps"] *= 1 + row["seed"]
    plain = ngram_start.summary_of(rows)[0]
    assert plain["tokens_per_row_step"] == pytest.approx(600 / 900)
    assert plain["tokens_per_row_step/min"] == pytest.approx(300 / 600)
    assert plain["tokens_per_row_step/max"] == pytest.approx(300 / 300)


def test_a_run_is_the_recipe_with_settings():
    overrides = {
        **recipes.DRAFTER,
        "num_steps": 3,
        "specdec.strategies": ("4:D1K1V2",),
    }
    run = recipes.settings_of(RECIPE, overrides)
    assert run.num_steps == 3 and run.specdec.mode == "tlt"
    assert run.log.progress == "off"


TINY_DRAFTER = """
from configs import tiny_drafter
def get_config():
    config = tiny_drafter.get_config()
    config.pretrain.steps = 2
    config.texts.num = 8
    config.texts.num_held_out = 4
    config.texts.max_new_tokens = 8
    config.texts.max_batch = 4
    config.batch.row_tokens = 32
    config.batch.row_bases = 24
    config.batch.head_chunk = 32
    config.eval.depth = 2
    return config
"""


def test_objectives_get_updates_by_their_cost(tmp_path, monkeypatch):
    asked = {}

    def train(run, directory):
        asked[run.objective.name, run.objective.token_loss, run.seed] = run.num_steps
        return {
            "eval/coupled_accept_length": 2.0 + run.seed,
            "eval/deterministic_accept_length": 1.5,
        }

    monkeypatch.setattr(train_drafter, "train", train)
    summary = objectives.main([f"--out={tmp_path}", "--unrolled=21", "--seeds=3"])
    assert asked["eagle", None, 0] == 21 and asked["hass", None, 0] == 7
    assert asked["eagle3", None, 0] == asked["eagle3", "tv", 2] == 3
    assert summary[0]["accept_length/coupled"] == 3.0
    assert summary[0]["accept_length/coupled/max"] == 4.0
    assert {row["unrolled"] for row in summary} == {21}
    assert (tmp_path / "objectives.png").stat().st_size > 10_000


@pytest.mark.slow
def test_an_objective_is_trained_and_measured(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(TINY_DRAFTER)
    monkeypatch.setattr(objectives, "CASES", {"eagle": objectives.CASES["eagle"]})
    summary = objectives.main(
        [f"--out={tmp_path}", f"--config={recipe}", "--unrolled=1", "--seeds=1"]
    )
    assert 1 <= summary[0]["accept_length/coupled"] <= 3


def test_programs_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(
        program_pool,
        "compiled",
        lambda config, case: {
            "programs": len(program_pool.CASES[case]),
            "code_bytes": 1_000_000,
            "scratch_bytes": 5,
            "compile_s": 1.5,
        },
    )
    rows = program_pool.main([f"--out={tmp_path}"])
    assert [row["published_gb"] for row in rows] == [None, 7.81, 30.39, 10.69]
    assert (tmp_path / "program_pool.png").stat().st_size > 10_000


def test_thresholds_are_compared_with_none(tmp_path, monkeypatch):
    monkeypatch.setattr(
        active_batch,
        "THRESHOLDS",
        {active_batch.RECORDED: (0, 8), active_batch.TIMELINE: (0, 32)},
    )
    summary = active_batch.main([f"--out={tmp_path}", "--rollouts=1", "--seeds=1"])
    found = {(r["world"], r["threshold"]): r["times_faster"] for r in summary}
    assert found["recorded", "0"] == found["timeline", "0"] == 1
    assert found["timeline", "32"] > 1.5 and found["recorded", "8"] > 1
    assert found["recorded", "oracle"] >= 0.99 * found["recorded", "8"]
    assert (tmp_path / "active_batch.png").stat().st_size > 10_000


def test_tails_and_time_are_read_from_a_workdir(tmp_path):
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    for step, lengths in ((1, [1, 2, 3, 94]), (2, [10, 10])):
        lines = [json.dumps({"num_tokens": n}) + "\n" for n in lengths]
        name = f"step_{step:06d}.jsonl"
        (folder / "rollouts" / name).write_text("".join(lines))
    rows = [{"step": n, "time/rollout_s": 3.0, "time/update_s": 1.0} for n in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    (row,) = length_tail.main(
        [f"--out={tmp_path}", f"--workdirs=mine={folder}", "--steps=1"]
    )
    assert row["responses"] == 4 and row["length/max"] == 94
    assert row["length/mean"] == 25 and row["frac/rollout"] == 0.75
    counts = tables.read(tmp_path / "length_tail_lengths.csv")
    assert {(r["tokens"], r["responses"]) for r in counts} >= {(94, 1), (1, 1)}
    (tmp_path / "length_tail.png").unlink()
    assert length_tail.EXPERIMENT.redraw(tmp_path) == "drawn"
    assert (tmp_path / "length_tail.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="has no rollouts"):
        length_tail.main([f"--out={tmp_path}", f"--workdirs=mine={tmp_path}"])
