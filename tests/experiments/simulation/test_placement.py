"""A learner with devices of its own: what a step costs, and what the table shows."""

import dataclasses

import pytest

from experiments import cluster_placement, cluster_size, planner
from experiments.simulation import cluster_records, costs, rl_step, workload
from tlt_jax.specdec import strategy

CFG = cluster_records.ClusterConfig(
    num_workers=1,
    workers_per_place=1,
    max_rows=1,
    num_pages=20,
    page_size=4,
    steps_per_call=8,
    max_new_tokens=40,
)
NONE = strategy.Arms(())


def step_by_step(num_steps=3, **changes):
    """Rollouts of 10 s, updates of 4 s, and no speculation."""
    scenario = rl_step.Scenario(
        cfg=CFG,
        costs=costs.TableCosts({(1, None): 1.0}),
        acceptance=workload.Acceptance({None: (0.5,)}),
        arms=NONE,
        table=NONE,
        threshold=1,
        responses=lambda _: workload.grouped([10], 1, 4),
        rest_s=lambda _: 4.0,
        **changes,
    )
    return rl_step.run(scenario, rl_step.OFF, num_steps, 0)


@pytest.mark.parametrize(
    "changes,steps,idle",
    [
        ({}, [14, 14, 14], [0, 0, 0]),
        # Weights go to workers for 2 s, and the learner waits for 12 of 16.
        ({"is_separate": True, "send_s": 2.0}, [16, 16, 16], [0.75] * 3),
        # From the second step on 12 s of rollout and weights beside 4 s of update.
        (
            {"is_separate": True, "send_s": 2.0, "lag": 1},
            [16, 12, 12],
            [0.75, 2 / 3, 2 / 3],
        ),
    ],
)
def test_a_step_by_placement_and_lag(changes, steps, idle):
    rows = step_by_step(**changes)
    assert [row["step_s"] for row in rows] == pytest.approx(steps)
    assert [row["learner_idle_frac"] for row in rows] == pytest.approx(idle)
    assert [row["rollout_s"] for row in rows] == pytest.approx([10] * 3)


def test_what_a_learner_of_its_own_costs():
    machine = cluster_size.machine_of("qwen2.5-7b")
    # 15.24 GB of weights in bf16, 2.5 GB/s.
    assert machine.send_s(2.5e9) == pytest.approx(6.096)
    scenario = cluster_size.scenario_of("qwen2.5-7b", 16, 2, 0)
    cfg = dataclasses.replace(scenario.cfg, num_workers=6)
    its = cluster_size.with_learner(scenario, cfg, 4, 1)
    # A quarter of the devices, and none of the 5 s of an exchange.
    assert its.rest_s(1e6) == pytest.approx(4 * (scenario.rest_s(1e6) - 5))
    assert (its.send_s, its.lag, its.cfg.num_workers) == (pytest.approx(6.096), 1, 6)
    # 122 GB of weights, gradients and moments; 68 of 80 GB are used.
    with pytest.raises(ValueError, match="1 devices of 80 GB do not hold the learner"):
        cluster_size.check_learner(machine, 1)
    cluster_size.check_learner(machine, 2)
    assert cluster_placement.splits("qwen2.5-7b", 8) == [2, 4]
    # 525 GB: not a half of eight devices; of sixteen it is.
    assert cluster_placement.splits("qwen2.5-32b", 8) == []
    assert cluster_placement.splits("qwen2.5-32b", 16) == [8]


def test_the_table_of_placements(tmp_path):
    rows = cluster_placement.main(
        [f"--out={tmp_path}", "--devices=8", "--models=qwen2.5-7b", "--steps=1"]
        + ["--num-prompts=1"]
    )
    told = [(row["placement"], row["lag"]) for row in rows]
    assert told == [("colocated", 0), ("separate", 0), ("separate", 1)]
    assert [row["learner_devices"] > 0 for row in rows] == [False, True, True]
    assert rows[0]["of_colocated"] == 1
    assert rows[2]["step_s"] < rows[1]["step_s"]
    assert (tmp_path / "cluster_placement.png").stat().st_size > 10_000


def test_the_planner_knows_separate_placement_without_lag():
    flags = ["--num-prompts=4", "--steps=1", "--max-rows=4", "--max-tokens=600"]
    flags += ["--devices=16", "--tensor=2", "--median=100", "--learner-devices=4"]
    turns, off, *_ = planner.main(flags)
    assert [turns["system"], off["system"]] == ["turns", "off"]
    assert turns["learner_idle_frac"] == turns["send_s"] == 0
    assert off["send_s"] == pytest.approx(6.096) and off["learner_idle_frac"] > 0.5
    faster = planner.main([*flags, "--weights-gb-s=25"])[1]
    assert off["step_s"] - faster["step_s"] == pytest.approx(0.9 * 6.096)
    with pytest.raises(ValueError, match="--weights-gb-s=0: more than 0"):
        planner.main([*flags, "--weights-gb-s=0"])
