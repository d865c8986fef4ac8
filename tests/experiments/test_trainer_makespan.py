"""The trainer's cost for a rollout: what is started, and what is made of it."""

import json

import pytest

from experiments import rollout_turns, trainer_makespan
from tests import tiny_runs
from tlt_jax import train
from tlt_jax.viz import timeline
from tlt_jax.workdir import progress

SECONDS = {True: (10.8, 10.6), False: (10.0, 10.2)}


def turns(steps=2, digest_with="ab"):
    """Two rounds; with the trainer a rollout takes 0.8 and 0.4 s longer."""
    rows = []
    for number in range(2):
        for step in range(steps):
            for trains in (False, True):
                one = {
                    "round": number,
                    "prefill_s": 1.0,
                    "decode_s": 17.17 if trains else 16.0,
                    "decode_steps": 404 if trains else 400,
                    "tokens": 900,
                    "turn": len(rows) + steps + 1,
                    "step": step,
                    "trains": trains,
                    "rollout_s": SECONDS[trains][number],
                    "idle_s": 2.0,
                    "trained_s": 1.8 if trains else 0.0,
                    "accept_length": 4.0,
                    "drafter_steps": 3 if trains else 0,
                    "digest": f"{step}{digest_with if trains else 'ab'}",
                }
                rows.append(one)
    return rows


def interval_record(number, trains):
    """Two rollouts; in each the first worker is through sooner."""
    waits = 0.1 if trains else 0.0
    busy = [[["busy", 0.0, 3.0], ["busy", 5.0, 7.0]], [["busy", 0.0, 4.0]]]
    busy[0].insert(1, ["training" if trains else "idle", 3.0, 4.0 + waits])
    busy[0].append(["idle", 7.0, 9.5 + waits])
    busy[1] += [["idle", 4.0, 4.0 + waits], ["busy", 5.0, 9.5]]
    busy[1].append(["idle", 9.5, 9.5 + waits])
    whole = [{"worker": i, "intervals": x} for i, x in enumerate(busy)]
    return {"step": number, "workers": whole}


def run(monkeypatch, tmp_path, *more, digest_with="ab"):
    """Lets the turns be records."""
    commands = []

    def start(command):
        if "experiments.decode_beside" in command:
            (out,) = [a for a in command if a.startswith("--json=")]
            found = {"alone": 30.0, "computing": 31.0, "streaming": 50.0}
            with open(out.removeprefix("--json="), "w", encoding="utf-8") as file:
                json.dump(found, file)
            return
        commands.append(command)
        (workdir,) = [a for a in command if a.startswith("--workdir=")]
        workdir = workdir.removeprefix("--workdir=")
        rows = turns(digest_with=digest_with)
        records = [interval_record(row["turn"], row["trains"]) for row in rows]
        for name, lines in ((rollout_turns.FILE, rows), (timeline.FILE, records)):
            with open(f"{workdir}/{name}", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(trainer_makespan.recipes, "start", start)
    options = [f"--drafter={tmp_path}", "--steps=2", "--rounds=2", "--set=seed=3"]
    return trainer_makespan.main([*options, f"--out={tmp_path}", *more]), commands


def test_rollouts_with_and_without_the_trainer_are_compared(monkeypatch, tmp_path):
    summary, commands = run(monkeypatch, tmp_path)
    assert [row["processes"] for row in summary] == [2, 2, 1, 1]
    without, beside = summary[:2]
    assert beside["times_as_long"] == pytest.approx(42.8 / 40.4)
    assert beside["times_as_long_error"] == pytest.approx((1.08 - 10.6 / 10.2) / 2)
    assert without["times_as_long"] == 1.0 and without["trained_of_idle"] == 0.0
    assert beside["trained_of_idle"] == pytest.approx(0.9)
    assert beside["rollout_s/median"] == pytest.approx(21.4)
    # A tenth behind each of two rollouts' ends, in four turns; and decoding.
    parts = {k: v for k, v in beside.items() if k.startswith("excess_")}
    assert parts["excess_waiting"] == pytest.approx(4 * 0.2 / 40.4)
    assert parts["excess_slower_steps"] == pytest.approx(1 / 16)
    assert parts["excess_further_steps"] == pytest.approx(0.01)
    assert sum(parts.values()) == pytest.approx(2.4 / 40.4)
    assert beside["step_ms"] == pytest.approx(42.5)
    assert beside["step_ms_alone"] == without["step_ms_alone"] == 30.0
    # The recipe's two workers: one in each process, or two in one.
    launched, alone = commands
    assert "tlt_jax.launch" in launched and "tlt_jax.launch" not in alone
    assert "--config.workers.num=1" in launched
    assert not any("workers.num" in part for part in alone)
    assert all("--config.seed=3" in command for command in commands)
    drawn = tmp_path / "trainer_makespan.png"
    assert drawn.stat().st_size > 10_000


def test_turns_of_other_tokens_do_not_compare(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="drew different tokens"):
        run(monkeypatch, tmp_path, digest_with="cd")


def test_workers_are_divided_evenly(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="3 processes of .* must divide workers.num=2"):
        run(monkeypatch, tmp_path, "--processes=3")


def test_turns_draw_the_same_tokens_and_train_when_they_shall(tmp_path):
    config = tiny_runs.config_of(
        **{
            "num_steps": 2,
            "workers.num": 2,
            "mesh.data": 2,
            "specdec.mode": "tlt",
            "drafter.features": "last",
            "adaptation.name": "eagle",
            "adaptation.row_tokens": 64,
            "adaptation.row_bases": 32,
            "adaptation.learning_rate": 1e-30,
            "specdec.tuner": "static",
            "specdec.strategies": ("1:D2K1V3",),
            "specdec.ngram_strategies": (),
            # Programs are compiled for each size of batch, and each worker.
            "rollout.max_batch": 1,
        }
    )
    display = progress.Progress(2, mode="off")
    with train.Trainer(config, tmp_path, display) as trainer:
        trainer.begin()
        taker = rollout_turns.Turns(trainer, tmp_path)
        kept = []
        trainer.parts.workers.on_text = lambda text: kept.append(text.version)
        rows = list(rollout_turns.by_turns(trainer, taker, rounds=2))
    assert [(row["round"], row["step"], row["trains"]) for row in rows] == [
        *((0, 0, False), (0, 0, True), (0, 1, True), (0, 1, False)),
        *((1, 0, True), (1, 0, False), (1, 1, False), (1, 1, True)),
    ]
    assert len({row["digest"] for row in rows if row["step"] == 0}) == 1
    assert len({row["digest"] for row in rows}) == 2
    # Texts are kept in the turns that may train alone, each of a version of its own.
    assert len(set(kept)) == 2 + 4
    assert all(row["trained_s"] <= row["idle_s"] for row in rows)
    assert not any(row["drafter_steps"] for row in rows if not row["trains"])
    assert [r["step"] for r in timeline.read(tmp_path)] == list(range(1, 11))
