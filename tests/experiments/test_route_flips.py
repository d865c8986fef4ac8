"""Flips of routes: what is run, what is counted, and what it decides."""

import pytest

from experiments import route_flips
from experiments.lab import claims, recipes, tables


@pytest.fixture
def asked(monkeypatch):
    """Settings that are asked for; records as runs would leave them."""
    asked = []

    def rows(num_steps, precision, routes, seed, accept_length):
        flips = 0.25 if (precision, routes) == ("bfloat16", "own") else 0.0
        made = [
            {
                "step": step,
                "reward/mean": 0.1 * (step + seed),
                "rollout/tokens": 100,
                "rollout/tokens_digest": f"{precision}/{seed}/{step}",
                "specdec/accept_length": accept_length,
                "mismatch/logprob_max_abs": 1e-6,
                "moe/route_flips": flips / step,
            }
            for step in range(1, num_steps + 1)
        ]
        # No group of this step carried signal.
        del made[1]["moe/route_flips"]
        return made

    def run(recipe, overrides):
        asked.append(overrides)
        names = ("num_steps", "precision", "learner.routes")
        return rows(*(overrides[n] for n in names), overrides.get("seed", 0), 1.0)

    def planned(settings, trains):
        assert trains(0)
        mesh = settings.mesh
        asked.append(
            {
                "specdec.strategies": settings.specdec.strategies,
                "mesh.fsdp": mesh.fsdp,
                "mesh.expert": mesh.expert,
                "model.spec": settings.model.spec,
            }
        )
        how = settings.precision, settings.learner.routes
        return rows(settings.num_steps, *how, settings.seed, 1.5)

    monkeypatch.setattr(recipes, "run", run)
    monkeypatch.setattr(recipes, "run_planned", planned)
    monkeypatch.setattr(route_flips.train, "train", lambda settings, folder: None)
    return asked


def test_every_run_begins_with_one_model(tmp_path, asked):
    options = [f"--out={tmp_path}", "--steps=3", "--whole-steps=12", "--seeds=2"]
    summary = route_flips.main(options)
    short = [one for one in asked if one.get("num_steps") != 12]
    assert len(summary) == len(asked) == 9 + 2 and len(short) == 9
    (model,) = {one["model.spec"] for one in short}
    assert model.endswith("initial_model")
    strategies = {one.get("specdec.strategies") for one in short}
    assert strategies == {None, ("8:D2K1V3",), ("8:D2K2V5N16",)}
    meshes = {(one["mesh.fsdp"], one["mesh.expert"]) for one in short}
    assert meshes == {(1, 1), (2, 2)}
    assert [one["seed"] for one in asked if one.get("num_steps") == 12] == [0, 1]

    flipped = [row for row in summary if row["flips/max"] > 0]
    assert {(r["precision"], r["routes"]) for r in flipped} == {("bfloat16", "own")}
    # Of steps 1 and 3.
    assert flipped[0]["flips"] == pytest.approx(0.25 * (1 + 1 / 3) / 2)
    second = tables.where(summary, steps=12, seed=1)[0]
    assert second["reward/first"] == pytest.approx(0.1 * 2.5)
    assert second["reward/last"] == pytest.approx(0.1 * 8.5)
    # Where nothing was decoded without speculation tokens are not compared.
    alone = tables.where(summary, precision="bfloat16", mesh="2 fsdp x 2 experts")
    assert [row["steps_differing"] for row in alone] == [None, None]
    assert (tmp_path / "route_flips.png").stat().st_size > 10_000
    found = route_flips.EXPERIMENT.check_claims(tmp_path)
    assert [row["verdict"] for row in found] == [claims.HOLDS] * 3


def test_one_flip_or_other_token_refutes_a_claim(tmp_path, asked):
    route_flips.main([f"--out={tmp_path}", "--steps=3", "--whole-steps=4"])
    path = tables.path_of(tmp_path, "route_flips")
    full = dict(precision="float32", routes="own", mesh="2 fsdp x 2 experts")
    half = dict(precision="bfloat16", routes="replay", mesh="2 fsdp x 2 experts")
    for where, column, value, failing in (
        (full, "flips", 1e-4, [True, False, False]),
        (half, "flips", 1e-4, [False, True, False]),
        (full, "tokens_digest", "another", [False, False, True]),
    ):
        rows = tables.read(path)
        tables.where(rows, **where, speculation="trees, budget")[2][column] = value
        made = route_flips.summary_of(rows)
        tables.write(tables.path_of(tmp_path, "route_flips", "summary"), made)
        found = route_flips.EXPERIMENT.check_claims(tmp_path)
        assert [row["verdict"] == claims.FAILS for row in found] == failing
    with pytest.raises(ValueError, match="--steps=5 is --whole-steps as well"):
        route_flips.main([f"--out={tmp_path}", "--steps=5", "--whole-steps=5"])
