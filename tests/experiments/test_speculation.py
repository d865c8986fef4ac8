"""The speculation experiments, run whole with a random drafter of a random model."""

import csv

import jax
import numpy as np
import pytest

from experiments import accept_length, speculation_speed
from experiments.lab import tables
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import convert
from tlt_jax.models.formats import tokenizer as model_tokenizer

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\n{% endif %}"
)
CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=104,
    num_layers=1,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
    max_positions=512,
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculation")
    tokenizer = model_tokenizer.from_alphabet(ALPHABET)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save(folder / "tokenizer")
    assert tokenizer.vocab_size <= CFG.vocab_size
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: rng.normal(size=w.shape).astype("f") / w.fan_in**0.5,
        model_params.describe(CFG),
    )
    model = folder / "model"
    convert.save(
        params, CFG, model, tokenizer_source=folder / "tokenizer", dtype="float32"
    )
    cfg = drafter.of_target(CFG, output_norm=False)
    drafter_io.save(
        folder / "drafter", drafter.init(cfg, jax.random.key(0)), cfg, {"steps": 3}
    )
    return [
        f"--model={model}",
        f"--drafter={folder / 'drafter'}",
        "--new-tokens=6",
        f"--out={folder / 'out'}",
    ], folder / "out"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_accept_length(arguments):
    given, out = arguments
    accept_length.main(
        [
            *given,
            "--num-prompts=2",
            "--batch=2",
            "--strategies=D1K1V2",
            "--temperatures=1,0",
        ]
    )
    rows = rows_of(out / "accept_length.csv")
    kinds = [(row["temperature"], row["ranking"]) for row in rows]
    assert kinds == [
        ("1.0", "coupled"),
        ("1.0", "deterministic"),
        ("1.0", "rejection"),
        ("1.0", "block"),
        ("0.0", "deterministic"),
    ]
    for row in rows:
        assert 1 <= float(row["accept_length"]) <= 2
        keyed = row["ranking"] in ("coupled", "deterministic")
        assert row["rows_as_first"] == "2" or not keyed
    ratio = float(rows[0]["accept_length"]) / float(rows[1]["accept_length"])
    assert float(rows[0]["times_deterministic"]) == pytest.approx(ratio, rel=1e-3)
    assert (out / "accept_length.png").stat().st_size > 0


def test_speculation_speed(arguments):
    given, out = arguments
    cases = "--cases=2:D1K1V2,2:D1K1V2N3"
    summary = speculation_speed.main([*given, cases, "--rounds=2"])
    systems = ["plain", "D1K1V2", "D1K1V2N3", "tuner"]
    assert [row["system"] for row in summary] == systems
    assert "speedup" not in summary[0] and summary[1]["speedup"] > 0
    assert summary[0]["step_cost"] == 1 and summary[0]["accept_length"] == 1
    assert all(row["rows_differing"] == 0 for row in summary)
    assert len(rows_of(out / "speculation_speed.csv")) == 8
    assert (out / "speculation_speed.png").stat().st_size > 0


def test_speculation_speed_that_is_stopped_keeps_what_it_measured(
    arguments, tmp_path, monkeypatch
):
    asked = []

    def run_paired(names, cases, decode, **how):
        """Takes no time, and is stopped in the last case."""
        asked.append(cases[0]["batch"])
        if asked[-1] == 2:
            raise KeyboardInterrupt
        measured = {"round": 0, "mean_rows": 1.0, "step_ms": 2.0}
        return [cases[0] | {"system": name} | measured for name in names]

    monkeypatch.setattr(speculation_speed.paired, "run_paired", run_paired)
    monkeypatch.setattr(speculation_speed, "noise_ms", lambda *given: 0.5)
    options = [*arguments[0], f"--out={tmp_path}", "--cases=1:D1K1V2,2:D1K1V2"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            speculation_speed.main(options)
        rows = tables.read(tmp_path / "speculation_speed.csv")
        assert [(row["batch"], row["system"]) for row in rows] == [
            (1, "plain"),
            (1, "D1K1V2"),
        ]
    # The second call took the first case up as it was there.
    assert asked == [1, 2, 2]
