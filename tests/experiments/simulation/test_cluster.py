"""The simulated cluster: against loops by hand, its laws, and recorded runs."""

import json

import numpy as np
import pytest

from experiments import (
    cluster_sensitivity,
    cluster_size,
    devices,
    planner,
    simulator_check,
)
from experiments.lab import tables
from experiments.simulation import (
    cluster,
    cluster_records,
    costs,
    published,
    recorded,
    rl_step,
    workload,
)
from tlt_jax.rl.workers import mailboxes, records
from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import build as tuners

CHAIN = strategy.parse("D3K1V4")
TABLE = costs.TableCosts(
    {
        (b, s): 1.0 + 0.1 * b + (0.5 if s else 0)
        for b in (1, 2, 4)
        for s in (None, CHAIN)
    },
    prefill_token_s=0.01,
    measured_s=0.7,
    drafter_s=2.0,
    start_s=0.5,
    sync_s=0.25,
)
SIZES = {
    "num_workers": 1,
    "workers_per_place": 8,
    "max_rows": 2,
    "num_pages": 40,
    "page_size": 4,
    "steps_per_call": 8,
    "max_new_tokens": 40,
}


def made(tuner=None, chance=0.7, seed=0, drafter=None, **changes):
    """Returns a cluster."""
    acceptance = workload.Acceptance({None: (chance,)}) if tuner else None
    cfg = cluster_records.ClusterConfig(**SIZES | changes)
    return cluster.Cluster(cfg, TABLE, acceptance, tuner, seed=seed, drafter=drafter)


def static():
    return tuners.build("static", strategy.Arms(((4, (CHAIN,)),)), max_rows=4, seed=0)


def decode_slowly(left, lifetimes, limit, quota):
    """Decodes row by row and step by step."""
    counts, lived, steps = [0] * len(left), [], 0
    while (
        max(counts) < limit
        and sum(c == n for c, n in zip(counts, left, strict=True)) < quota
    ):
        for i, most in enumerate(left):
            if counts[i] < most:
                accepted = 0 if lifetimes is None else int(lifetimes[i][steps])
                lived.append(accepted)
                counts[i] = min(counts[i] + accepted + 1, most, limit)
        steps += 1
    if lifetimes is None:
        return steps, counts, ()
    deepest = max(lived)
    return steps, counts, tuple(sum(n >= d for n in lived) for d in range(deepest + 1))


@pytest.mark.parametrize("speculates", [False, True])
def test_a_call_is_what_steps_one_by_one_are(speculates):
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, limit = rng.integers(1, 5), int(rng.integers(1, 9))
        left = rng.integers(1, 20, rows)
        quota = int(rng.integers(1, rows + 1))
        lifetimes = rng.integers(0, 4, (rows, limit)) if speculates else None
        steps, counts, accepted = cluster.decode(left, lifetimes, limit, quota)
        expected = decode_slowly(left, lifetimes, limit, quota)
        assert (steps, counts.tolist(), accepted) == expected


def test_a_rollout_by_hand():
    """Two rows of 5 and 12 tokens: prefill, 5 steps at two rows, then 7 at one."""
    report = made().roll_out(workload.grouped([5, 12], 2, 5))
    # The call comes back when one row has ended: the rest fits the smaller bucket.
    assert report.steps_by_kind == {(2, None): 5, (1, None): 7}
    assert report.makespan_s == pytest.approx(4 * 0.01 + 5 * 1.2 + 7 * 1.1)
    assert report.num_tokens == 17
    assert report.prefill_s == pytest.approx(0.04)  # The prompt is shared.


def test_accepted_drafts_shorten_it_as_their_chance_says():
    lengths = [40] * 64
    report = made(static()).roll_out(workload.grouped(lengths, 8, 5))
    chain = 1 + 0.7 + 0.7**2 + 0.7**3
    assert report.accept_length == pytest.approx(chain, rel=0.03)
    plain = made().roll_out(workload.grouped(lengths, 8, 5))
    assert report.num_steps < plain.num_steps / 2
    assert report.num_tokens == plain.num_tokens == 40 * 64


def test_what_is_known_of_a_response_holds_for_it():
    text = workload.Drafted(40, tuple(range(40)))
    responses = workload.grouped([40] * 32, 8, 5, [text] * 32)
    assert made(static(), chance=1.0).roll_out(responses).accept_length == 1


def test_a_recorded_text_is_drafted_as_it_was():
    # Places 2, 3 and 8 of ten were not guessed; at most 3 are drafted at once.
    text = workload.Drafted(10, (2, 3, 8))
    assert text.accepted(0, 3, 4) == [2, 0, 0, 0]  # After 4 tokens the call ends.
    assert text.accepted(0, 3, 12) == [2, 0, 3, 0, 1, 1, *[0] * 6]
    assert text.accepted(9, 3, 3) == [1, 1, 0]  # From its end on it begins again.
    report = made(static()).roll_out(workload.grouped([10], 1, 5, [text]))
    # 3 + 1 + 4 tokens of the first call's 8, then 1 + 1: five steps.
    assert report.num_steps == 5 and report.num_tokens == 10
    assert report.accept_length == pytest.approx(1 + 6 / 5)


def test_waiting_workers_train_and_delay_the_end_by_a_step_at_most():
    lengths = [40, 3, 3, 3, 3, 3, 3, 3]
    trained = made(static(), num_workers=2, trains=True)
    report = trained.roll_out(workload.grouped(lengths, 4, 5))
    idle = made(static(), num_workers=2, trains=False)
    without = idle.roll_out(workload.grouped(lengths, 4, 5))
    assert report.num_drafter_steps > 0 and without.num_drafter_steps == 0
    assert report.sums["workers/trained_s"] > 0
    late = report.makespan_s - without.makespan_s
    most = TABLE.start_s + TABLE.measured_s + TABLE.drafter_s + TABLE.sync_s
    assert 0 <= late <= most
    assert trained.drafter.version == 1
    doing = {i.activity for i in report.intervals}
    assert doing >= {records.Activity.BUSY, records.Activity.TRAINING}


def test_the_drafter_learns_while_workers_wait_and_falls_behind_at_updates():
    state = cluster_records.Drafter(quality=0.5, learned=0.2, lost=0.1)
    simulated = made(static(), num_workers=2, drafter=state)
    simulated.roll_out(workload.grouped([40, 3, 3, 3], 4, 5))
    learned = simulated.drafter.quality
    assert learned > 0.5
    simulated.changed_target()
    assert simulated.drafter.quality == pytest.approx(0.9 * learned)


def test_rows_without_pages_come_back():
    report = made(num_pages=14, max_rows=4).roll_out(
        workload.grouped([40, 38, 36, 30], 2, 5)
    )
    assert report.num_preempted > 0
    assert report.num_tokens == 40 + 38 + 36 + 30


def test_all_is_generated_once_by_many_workers():
    lengths = np.random.default_rng(1).integers(1, 41, 96)
    report = made(static(), num_workers=8, workers_per_place=2).roll_out(
        workload.grouped(lengths, 4, 5)
    )
    assert report.num_tokens == lengths.sum()
    spent = sum(i.stop_s - i.start_s for i in report.intervals)
    assert spent == pytest.approx(8 * report.makespan_s)


def test_the_same_seed_gives_the_same():
    responses = workload.grouped([40, 30, 20, 10], 2, 5)
    first, again, other = (
        made(static(), seed=seed).roll_out(responses).makespan_s for seed in (3, 3, 4)
    )
    assert first == again != other


def test_the_system_decides(monkeypatch):
    """Without the coordinator's word nobody trains, whatever the simulator thinks."""
    monkeypatch.setattr(
        mailboxes.Coordination, "should_stop", lambda self, training: True
    )
    report = made(static(), num_workers=2).roll_out(
        workload.grouped([40, 3, 3, 3], 4, 5)
    )
    assert report.num_drafter_steps == 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: made(max_rows=0), "max_rows=0 is out of range"),
        (lambda: made().roll_out(workload.grouped([41], 1, 5)), "num_tokens=41"),
        (lambda: made().roll_out(workload.grouped([3], 1, 200)), "raise cache"),
        (lambda: TABLE.step_s(8, None, 0), "bucket 8 with plain decoding"),
        (lambda: workload.Acceptance({None: (1.2,)}), "chance"),
        (lambda: workload.hazard_of(9.0, 4), "accept_length=9"),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_hazards_give_the_accept_length_asked_for():
    for depth, wanted in ((3, 2.5), (12, 9.06), (8, 1.0), (4, 5.0)):
        hazard = workload.hazard_of(wanted, depth)
        assert sum(hazard**d for d in range(depth + 1)) == pytest.approx(wanted)


def test_published_accept_lengths_are_met_between_and_at_their_ends():
    assert published.accept_length(strategy.parse("D12K8V16")) == pytest.approx(7.02)
    assert published.accept_length(strategy.parse("D8K8V128")) == pytest.approx(7.51)
    assert 7.02 < published.accept_length(strategy.parse("D12K8V64")) < 9.06
    for found, told in zip(
        published.fit().predicted, published.SPEEDUPS.values(), strict=True
    ):
        assert found == pytest.approx(told, rel=0.3)


def test_the_first_training_of_a_target_examines_the_drafter():
    """One worker waits from 3 on; of the other's seconds so many drafter steps fit."""
    simulated = made(static(), num_workers=2)
    responses = workload.grouped([40, 3, 3, 3], 4, 5)
    first = simulated.roll_out(responses)
    again = simulated.roll_out(responses)
    assert again.sums["workers/trained_s"] % TABLE.drafter_s == pytest.approx(
        TABLE.sync_s
    )
    examined = TABLE.sync_s + TABLE.measured_s
    assert first.sums["workers/trained_s"] % TABLE.drafter_s == pytest.approx(examined)
    simulated.changed_target()
    third = simulated.roll_out(responses)
    assert third.sums["workers/trained_s"] % TABLE.drafter_s == pytest.approx(examined)


def test_makespans_agree_with_the_recorded_runs(tmp_path, monkeypatch):
    """Within a tenth in all; plain decode calls are scheduled as they were, exactly."""
    monkeypatch.setattr(simulator_check, "RATIOS", (0.6, 0.9))
    summary = simulator_check.main([f"--out={tmp_path}", "--seeds=1"])
    assert all(row["within_tolerance"] for row in summary)
    told = {(row["system"], row["given"]): row for row in summary}
    for system in simulator_check.SYSTEMS:
        # Told what it cannot know, it is off by little in single RL steps, too.
        assert told[system, "speed"]["median_step_error"] < 0.06
        assert told[system, "speed"]["steps_within_tolerance"] >= 14
    rows = tables.read(tmp_path / "simulator_check.csv")
    off = [r for r in rows if r["system"] == "off" and r["given"] == "lengths"]
    exact = [r["decode_steps"] == r["decode_steps/run"] for r in off]
    assert sum(exact) >= len(exact) / 2
    close = [r["decode_steps"] / r["decode_steps/run"] for r in off]
    assert 0.95 < min(close) <= max(close) < 1.05
    assert (tmp_path / "simulator_check.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "simulator_check.json").read_text())
    assert record["config_hash"]


def test_costs_are_calibrated_on_what_a_run_recorded(tmp_path):
    """Of 100 decode steps 20 at one row, at half the seconds of two; 5 trainings."""
    values = {
        "rollout/decode_steps": 100,
        "rollout/row_steps": 180,
        "rollout/decode_s": 9.0,
        "rollout/prefill_tokens": 50,
        "rollout/prefill_s": 1.0,
        "workers/trained_s": 3.0,
        "drafter/train_s": 2.0,
        "drafter/num_steps": 4,
    }
    longer = values | {"workers/trained_s": 3.3}
    steps = [
        recorded.Step(2, ((10, 12),), (((0, 9), (1,)),), values, 2, 1, 14.0),
        recorded.Step(3, ((10, 20),), (((0, 9), ()),), longer, 3, 2, 14.0),
    ]
    path = tmp_path / "run.jsonl"
    recorded.write(steps, path)
    assert recorded.read(path) == steps
    table = recorded.calibrated(steps, None, 0.5)
    assert table.steps == pytest.approx({(1, None): 0.05, (2, None): 0.1})
    assert table.prefill_token_s == pytest.approx(0.02)
    assert table.finished_s == pytest.approx(1.0 * 8 / 4)
    assert table.drafter_s == pytest.approx(0.5)
    # One more published, 0.3 s more; what is left of 1 s was the examination.
    assert (table.sync_s, table.measured_s) == pytest.approx((0.3, 0.7))
    assert table.times(2.0).steps[2, None] == pytest.approx(0.2)
    rng = np.random.default_rng(0)
    texts = recorded.Texts(steps, 20, num_nearest=1)
    drawn = texts.draw([19, 20, 12, 9], rng)
    assert [text.num_tokens for text in drawn] == [12, 20, 12, 10]


def test_clusters_by_size(tmp_path):
    summary = cluster_size.main(
        [f"--out={tmp_path}", "--devices=8,16", "--models=qwen2.5-7b", "--steps=1"]
        + ["--num-prompts=6"]
    )
    by_system = {(r["devices"], r["system"]): r for r in summary}
    assert by_system[8, rl_step.OFF]["times_faster"] == 1
    for number in (8, 16):
        assert by_system[number, rl_step.PAPER]["times_faster"] > 1
        assert by_system[number, rl_step.PAPER]["published"]
    assert (tmp_path / "cluster_size.png").stat().st_size > 10_000
    told = tables.read(tmp_path / "cluster_size_assumptions.csv")
    assert {"what", "value", "from"} == set(told[0])


def test_slower_memory_gains_more(tmp_path):
    rows = devices.main([f"--out={tmp_path}"])
    found = {row["device"]: row["times_faster"] for row in rows}
    assert found["b200"] < found["h100"] < found["a100"] < found["rtx 3090"]
    for row in rows:
        assert row["times_faster"] == pytest.approx(row["published"], rel=0.2)


def test_what_is_assumed_can_be_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_sensitivity, "CLUSTERS", (("qwen2.5-7b", 16),))
    options = [f"--out={tmp_path}", "--num-prompts=6"]
    changes = "update twice as long;drafts 20 % fewer;2048 responses"
    rows = cluster_sensitivity.main([*options, f"--changes={changes}"])
    found = {row["change"]: row for row in rows}
    base = found["as assumed"]
    assert found["update twice as long"]["times_faster"] < base["times_faster"]
    assert found["drafts 20 % fewer"]["times_faster"] < base["times_faster"]
    assert found["2048 responses"]["off_step_s"] > base["off_step_s"]
    assert base["published"] == 1.45
    with pytest.raises(ValueError, match="gone"):
        cluster_sensitivity.main([*options, "--changes=gone"])


@pytest.fixture
def workdir(tmp_path):
    """A run's workdir, as far as lengths go."""
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    lines = [json.dumps({"num_tokens": n}) + "\n" for n in (20, 30, 500, 40)]
    (folder / "step_000001.jsonl").write_text("".join(lines))
    return folder.parent


SMALL = ["--num-prompts=4", "--steps=1", "--max-rows=4", "--max-tokens=600"]


def test_the_planner_reads_lengths_models_and_times(tmp_path, workdir, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "hidden_size": 512,
                "num_hidden_layers": 4,
                "intermediate_size": 1024,
                "vocab_size": 1000,
            }
        )
    )
    times = tmp_path / "times.csv"
    rows = [f"{b},{s},0.0{b}" for b in (1, 2, 4) for s in ("plain", "D3K1V4")]
    times.write_text("\n".join(["rows,strategy,seconds", *rows]) + "\n")
    summary = planner.main(
        [
            *SMALL,
            *("--devices=2", f"--model={tmp_path}", f"--lengths={workdir}"),
            *("--accept-length=3", "--accept-depth=3", "--strategies=4:D3K1V4"),
            *(f"--step-times={times}", f"--out={tmp_path / 'plan.csv'}"),
        ]
    )
    # As measured a step costs the same with drafts: their tokens are the speedup.
    assert summary[1]["rollout_times_faster"] == pytest.approx(3, rel=0.25)
    assert "Predicted: speculation makes" in capsys.readouterr().out
    assert (tmp_path / "plan.csv").exists()


def test_the_planner_tells_whether_idle_time_keeps_the_drafter_adapted():
    flags = [*SMALL, "--steps=2", "--devices=16", "--tensor=2", "--median=100"]
    fast, slow = (
        planner.main([*flags, "--stale-accept-length=2", f"--learned={learned}"])[1]
        for learned in (0.5, 0.0)
    )
    assert fast["drafter_quality"] > 0.95 and fast["drafter_steps"] > 0
    assert slow["drafter_quality"] == pytest.approx(0.8)
    assert slow["accept_length"] < fast["accept_length"]


@pytest.mark.parametrize(
    "lag,steps",
    [
        # By turns: 10 + 4, 20 + 4, ...
        (0, [14.0, 24.0, 14.0, 24.0]),
        # Rollouts end at 10, 30, 40 and 60; each waits for nobody.
        (1, [14.0, 20.0, 10.0, 20.0]),
        (9, [14.0, 20.0, 10.0, 20.0]),
    ],
)
def test_rollouts_and_updates_side_by_side_take_the_longer_of_both(lag, steps):
    line = rl_step.Line(lag)
    assert [line.step(rollout_s, 4.0) for rollout_s in (10.0, 20.0) * 2] == steps
    # Where the learner is the slower one, workers wait for weights of their age.
    line, waits = rl_step.Line(lag), []
    for _ in range(4):
        waits.append(line.wait_s())
        line.step(1.0, 5.0)
    assert waits == {0: [0, 5, 5, 5], 1: [0, 0, 4, 4], 9: [0, 0, 0, 0]}[lag]


def test_the_planner_lets_rollouts_go_on_beside_updates(capsys):
    flags = [*SMALL, "--steps=2", "--devices=16", "--tensor=2", "--median=100"]
    flags += ["--weights-gb-s=25", "--lag=1", "--learner-devices=4"]
    turns, off, *_ = planner.main(flags)
    assert [turns["system"], off["system"]] == ["turns", "off"]
    assert turns["times_faster"] == 1
    assert off["step_s"] < turns["step_s"] and off["times_faster"] > 1
    assert "a learner with devices of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device=abacus"], "--device=abacus is not known: use one of a100"),
        (["--model=nowhere"], "--model=nowhere is neither"),
        (["--devices=10", "--tensor=4"], "cannot be divided"),
        (["--num-prompts=0"], "--num-prompts=0: at least 1"),
        (["--sigma=-1"], "--sigma=-1"),
        (["--learned=2"], "--learned=2: 0 to 1"),
        (["--lag=1"], "--lag=1 --learner-devices=0: rollouts go on beside"),
        (["--lag=-1"], "--lag=-1: at least 0"),
        (["--learner-devices=1"], "hold the learner's state, 122 GB: give it more"),
        (
            ["--lag=1", "--learner-devices=64"],
            "--learner-devices=64 leaves 0 of --devices=64",
        ),
        (["--stale-accept-length=7"], "more than that of the adapted"),
        (["--lengths=nowhere"], "has no rollouts"),
        (["--step-times=nowhere.csv"], "cannot be read"),
        (["--accept-length=20"], "accept_length=20 cannot come of draft_depth=8"),
        (["--strategies=4:D3K1"], "is not of the form"),
        (["--model=llama-3.3-70b"], "do not hold the model's weights"),
    ],
)
def test_the_planner_says_what_is_wrong(flags, message):
    with pytest.raises(ValueError, match=message):
        planner.main(flags)


def test_lengths_beyond_the_limit_are_refused(workdir):
    with pytest.raises(ValueError, match="500 tokens, more than --max-tokens=300"):
        planner.main([f"--lengths={workdir}", "--max-tokens=300"])


def test_a_mixtures_step_reads_the_experts_that_its_columns_touch(tmp_path):
    model = costs.MODELS["qwen3-30b-a3b"]
    # Of 128 experts a token passes 8; of two tokens' 16 one in sixteen is the same.
    assert model.mixture.touched_frac(1) == pytest.approx(8 / 128)
    assert model.mixture.touched_frac(2) == pytest.approx(15.5 / 128)
    assert model.active_params == pytest.approx(3.3e9, rel=0.05)
    assert model.read_params(1000) == pytest.approx(model.num_params)
    assert costs.MODELS["qwen2.5-7b"].read_params(1) == 7.62e9
    machine = costs.RooflineCosts(costs.DEVICES["h200"], model, 1, layer_s=0.0)
    one, tree = machine.step_s(1, None, 0), machine.step_s(16, None, 0)
    experts = 1 - (1 - 8 / 128) ** 16
    extra = 2 * (experts - 8 / 128) * model.mixture.params
    assert tree - one == pytest.approx(extra / (4.8e12 * 0.75))
    # Of four rows that share 16 nodes no more than 16 columns are read, and computed.
    target_s = machine._target_s
    shared = strategy.parse("D7K1V8N16-ngram")
    assert machine.step_s(4, shared, 0) == target_s(16, 0) == tree
    assert machine.step_s(4, strategy.parse("D7K1V8-ngram"), 0) == target_s(32, 0)
    # The drafter is dense: attention, three products of 6144, and the target's head.
    assert model.drafter_params == pytest.approx(376e6, rel=0.01)

    config = dict(
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        hidden_size=2048,
        num_hidden_layers=48,
        intermediate_size=6144,
        vocab_size=151936,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = planner.model_of(str(tmp_path))
    assert read.mixture == model.mixture
    assert read.num_params == pytest.approx(model.num_params, rel=0.01)
    # Mixtral and OLMoE have one width, that of an expert.
    config |= dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=14336)
    del config["num_experts"], config["moe_intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    mixture = planner.model_of(str(tmp_path)).mixture
    assert (mixture.num, mixture.d_ff) == (8, 14336)
    assert mixture.params == 48 * 8 * 3 * 2048 * 14336
