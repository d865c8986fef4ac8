"""Short trainings of a drafter's variants: what each is given, at equal cost."""

import types

import pytest

from experiments import drafter_variants
from experiments.lab import tables
from tlt_jax.models import config as model_config

MODEL = model_config.ModelConfig(
    family="llama",
    vocab_size=49152,
    num_layers=30,
    d_model=576,
    d_ff=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tie_embeddings=True,
)


@pytest.fixture
def trained(monkeypatch):
    """Trainings that take no time, and find what their settings say."""
    runs = []

    def train(run, directory):
        assert (directory / "texts" / "about.json").read_text() == "{}"
        runs.append(run)
        lengths = {"coupled": 1.0 + run.num_steps / 100, "deterministic": 1.25}
        found = {f"eval/{name}_accept_length": x for name, x in lengths.items()}
        found |= {f"eval/{name}_rate_by_depth": [0.25, 0.125] for name in lengths}
        return found | {"eval/sharpness": 1.5, "eval/tau": 0.5}

    source = types.SimpleNamespace(config=MODEL)
    module = drafter_variants.model_source
    monkeypatch.setattr(module, "resolve", lambda spec: source)
    monkeypatch.setattr(drafter_variants.train_drafter, "train", train)
    return runs


def test_every_variant_has_the_updates_that_cost_the_same(tmp_path, trained):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "about.json").write_text("{}")
    arguments = [f"--texts={texts}", f"--out={out}", "--updates=60"]
    rows = drafter_variants.main(arguments)
    updates = {row["case"]: row["updates"] for row in rows}
    assert updates["the recipe"] == 60 and updates["half the rows"] == 120
    assert updates["cross entropy"] == updates["three times the rate"] == 60
    # Three steps for one, but for what all steps share: the target's laws, the context.
    assert updates["one unrolled step"] == 138
    assert updates["seven unrolled steps"] == 28
    assert updates["8192 tokens"] == 83 and updates["all tokens"] == 28
    costs = tables.column(rows, "gflop")
    assert updates["a block drafter"] == 25
    assert max(costs) < 1.03 * min(costs)
    by_case = dict(zip(updates, trained, strict=True))
    assert [run.num_steps for run in trained] == list(updates.values())
    assert by_case["all tokens"].drafter.draft_vocab_size == 0
    assert by_case["the recipe"].drafter.draft_vocab_size == 16384
    assert by_case["the recipe"].texts.round_steps == 0
    assert by_case["the recipe"].texts.num == 256
    assert by_case["HASS"].objective.overrides() == {"num_steps": 3}
    assert drafter_variants.EXPERIMENT.redraw(out) == "drawn"
    verdicts = drafter_variants.EXPERIMENT.check_claims(out)
    assert [row["verdict"] for row in verdicts] == ["fails", "fails"]
    assert "best one unrolled step 2.380" in verdicts[0]["found"]
