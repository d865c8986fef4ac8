"""What a first guess can be told from: a target whose law is known to be linear."""

import types

import numpy as np
import pytest

from experiments import drafter_limits
from experiments.lab import tables
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.specdec.texts import layout, shards

VOCAB, D, LENGTH = 40, 8, 60


def texts(num):
    """Texts whose next feature is a linear map of the token and the last feature."""
    rng = np.random.default_rng(0)
    embed = rng.standard_normal((VOCAB, D), np.float32)
    by_token, by_last = rng.standard_normal((2, D, D), np.float32)
    unit = drafter_limits._unit
    records = []
    for number in range(num):
        tokens = rng.integers(0, VOCAB, LENGTH).astype(np.int32)
        hidden = [rng.standard_normal(D, np.float32)]
        for token in tokens[1:]:
            read = (
                unit(embed[token][None]) @ by_token + unit(hidden[-1][None]) @ by_last
            )
            hidden.append(read[0].astype(np.float32))
        hidden = np.stack(hidden)
        text_id = number + (offline_texts.HELD_OUT if number % 8 == 0 else 0)
        features = np.concatenate([np.ones_like(hidden), 2 * hidden], axis=1)
        key = np.zeros(2, np.uint32)
        records.append(layout.Record(text_id, tokens, 4, hidden, features, key))
    return embed, records


@pytest.fixture
def world():
    embed, records = texts(40)
    own = [record for record in records if record.text_id < offline_texts.HELD_OUT]
    held_out = [record for record in records if record not in own]
    return drafter_limits.World(embed, embed, (1,), own[3:], own[:3], held_out)


def look(world, case):
    options = types.SimpleNamespace(positions=512)
    (row,) = drafter_limits.measure(options, world, tables.Cell({"case": case}, None))
    return row


def test_what_the_law_hangs_on_is_found(world):
    token, last = look(world, "token alone"), look(world, "last feature")
    layers = look(world, "three layers")
    assert last["overlap"] > 0.98 and last["same_top"] > 0.95
    assert last["inputs"] == 2 * D + 1 and last["known_mass"] == pytest.approx(1)
    # One of its layers is the last feature, at another scale.
    assert layers["overlap"] > 0.98 and layers["inputs"] == 3 * D + 1
    assert token["overlap"] < 0.8 and token["overlap_own"] < 0.8
    assert token["positions"] == len(world.train) * (LENGTH - 2 - 2)


def test_few_texts_are_known_too_well(world):
    world.train[:] = world.train[:16]
    few = look(world, "1/16 of the texts")
    assert few["positions"] == LENGTH - 4


def test_tokens_that_cannot_be_proposed_are_missing(world, monkeypatch):
    case = (("token", "last"), 1.0, 0, 10)
    monkeypatch.setitem(drafter_limits.CASES, "ten tokens", case)
    row = look(world, "ten tokens")
    assert 0.1 < row["known_mass"] < 0.5
    assert row["overlap"] <= row["known_mass"]


def test_texts_are_read_from_a_trainings_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no texts of a drafter's training"):
        drafter_limits.EXPERIMENT.parse([f"--texts={tmp_path}"])
    (tmp_path / "about.json").write_text("{}")
    shards.Shards(tmp_path, "bfloat16").append(texts(3)[1][1:])
    options = drafter_limits.EXPERIMENT.parse([f"--texts={tmp_path}"])
    with pytest.raises(ValueError, match="has no texts, or none held out"):
        drafter_limits.load(options)
