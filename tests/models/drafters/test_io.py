"""A drafter's directory: what is written comes back, and what does not fit is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.specdec import tiny_drafter
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io

CFG = tiny_drafter.drafter_config(max_length=64)


@pytest.fixture
def saved(tmp_path):
    params = tiny_drafter.params_of(CFG).replace(draft_ids=tiny_drafter.DRAFT_IDS)
    drafter_io.save(tmp_path / "drafter", params, CFG, {"objective": "eagle3"})
    return tmp_path / "drafter", params


def test_saved_drafter_is_loaded(saved):
    directory, params = saved
    cfg, loaded = drafter_io.load(directory, tiny_drafter.TARGET)
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded.draft_ids.dtype == "int32"
    # Again, in place of the old one.
    drafter_io.save(directory, params, CFG)
    assert drafter_io.load(directory, tiny_drafter.TARGET)[0] == CFG
    assert [path.name for path in directory.parent.iterdir()] == ["drafter"]


@pytest.mark.parametrize("size", [1, 3])
def test_a_block_comes_back_and_needs_all_of_it(tmp_path, size):
    cfg = tiny_drafter.drafter_config(architecture="block", block_size=size)
    params = tiny_drafter.params_of(cfg).replace(draft_ids=tiny_drafter.DRAFT_IDS)
    drafter_io.save(tmp_path / "drafter", params, cfg)
    loaded_cfg, loaded = drafter_io.load(tmp_path / "drafter", tiny_drafter.TARGET)
    assert loaded_cfg == cfg and (loaded.block.masks is None) == (size == 1)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    edit(tmp_path / "drafter", block_size=5)
    with pytest.raises(ValueError, match="block.masks is .* should be .4, 16."):
        drafter_io.load(tmp_path / "drafter", tiny_drafter.TARGET)
    edit(tmp_path / "drafter", block_size=99)
    with pytest.raises(ValueError, match="block_size=99: .* guesses 1 to 32 tokens"):
        drafter_io.load(tmp_path / "drafter", tiny_drafter.TARGET)


def test_what_earlier_versions_do_not_say_is_no_block(tmp_path):
    cfg = tiny_drafter.drafter_config(architecture="eagle", feature_layers=())
    cfg = dataclasses.replace(cfg, draft_vocab_size=0)
    drafter_io.save(tmp_path / "drafter", tiny_drafter.params_of(cfg), cfg)
    path = tmp_path / "drafter" / "config.json"
    record = json.loads(path.read_text())
    del record["block_size"], record["markov_rank"]
    path.write_text(json.dumps(record))
    assert drafter_io.load(tmp_path / "drafter", tiny_drafter.TARGET)[0] == cfg


@pytest.mark.parametrize("name", ["sharpness", "tau"])
def test_what_was_measured_comes_back_and_must_be_positive(saved, name):
    directory, params = saved
    # To float32 alone this is itself.
    for value in (np.float32(1.2345678), np.float32(0)):
        drafter_io.save(directory, params.replace(**{name: value}), CFG)
        if value:
            _, loaded = drafter_io.load(directory, tiny_drafter.TARGET, "bfloat16")
            assert getattr(loaded, name).dtype == np.float32
            assert getattr(loaded, name) == value
            # The other one was not measured, as in older files.
            wanted = {"sharpness": (value, 0.5), "tau": (1, value)}
            assert drafter.measured(loaded) == wanted[name]
    with pytest.raises(ValueError, match=f"{name} 0.0, which should be positive"):
        drafter_io.load(directory, tiny_drafter.TARGET)


def test_drafter_of_another_target_is_refused(saved):
    for field, value in (("vocab_size", 25), ("num_layers", 5), ("d_model", 32)):
        other = dataclasses.replace(tiny_drafter.TARGET, **{field: value})
        with pytest.raises(ValueError, match="drafter of another target, qwen3-L4-D16"):
            drafter_io.load(saved[0], other)


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_drafters_are_refused(saved, tmp_path):
    directory, params = saved

    def load():
        return drafter_io.load(directory, tiny_drafter.TARGET)

    weights = (directory / "drafter.safetensors").read_bytes()
    (directory / "drafter.safetensors").write_bytes(weights[:-9])
    with pytest.raises(ValueError, match="missing, truncated or corrupt"):
        load()
    (directory / "drafter.safetensors").write_bytes(weights)
    edit(directory, draft_vocab_size=7)
    with pytest.raises(ValueError, match=r"draft_ids is \(11,\) and should be \(7,\)"):
        load()
    edit(directory, draft_vocab_size=11, feature_layers=[0, 9])
    with pytest.raises(ValueError, match=r"feature_layers names layers \[9\]"):
        load()
    edit(directory, feature_layers="all")
    with pytest.raises(ValueError):
        load()
    edit(directory, feature_layers=[0, 1, 3], format=3)
    with pytest.raises(ValueError, match="format 3, and 1 and 2 are read here"):
        load()
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a drafter's"):
        load()
    with pytest.raises(ValueError, match="holds no drafter"):
        drafter_io.load(tmp_path, tiny_drafter.TARGET)
    with pytest.raises(ValueError, match="something that is no drafter"):
        drafter_io.save(tmp_path, params, CFG)


def test_ids_outside_the_vocabulary_are_refused(saved):
    directory, _ = saved
    path = directory / "drafter.safetensors"
    arrays = safetensors.numpy.load_file(path)
    for ids, message in (
        (arrays["draft_ids"] + 2, "from 2 to 24, outside"),
        (arrays["draft_ids"][::-1].copy(), "do not rise"),
    ):
        safetensors.numpy.save_file(arrays | {"draft_ids": ids}, path)
        with pytest.raises(ValueError, match=message):
            drafter_io.load(directory, tiny_drafter.TARGET)
