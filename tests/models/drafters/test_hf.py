"""Directories of other projects: what is one, what is read, what stops a write."""

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.models import published_drafters as published
from tlt_jax.models.drafters import hf as drafter_hf

TARGET = published.TARGET


def test_a_directory_that_is_no_published_drafter_is_none(tmp_path):
    assert drafter_hf.layout_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert drafter_hf.layout_of(tmp_path) is None
    with pytest.raises(ValueError, match="has none of the published layouts"):
        drafter_hf.load(tmp_path, TARGET)
    (tmp_path / "config.json").write_text("{")
    assert drafter_hf.layout_of(tmp_path) is None
    for layout in published.SHAPES:
        directory = published.write(tmp_path / layout, layout)
        assert drafter_hf.layout_of(directory) == layout


def test_weights_are_read_in_the_files_types_with_ids_as_integers(tmp_path):
    given = published.tensors("eagle3")
    cfg, params = drafter_hf.load(published.write(tmp_path, "eagle3", given), TARGET)
    assert (cfg.architecture, cfg.draft_vocab_size) == ("eagle3", 11)
    assert params.draft_ids.dtype == np.int32
    np.testing.assert_array_equal(params.draft_ids, published.DRAFT_IDS)
    assert params.fuse.dtype == np.float16
    np.testing.assert_array_equal(params.fuse, given["fc.weight"])
    np.testing.assert_array_equal(
        params.layer.gate_up[1], given["midlayer.mlp.up_proj.weight"]
    )


def test_bfloat16_of_torch_keeps_its_bits(tmp_path):
    given = published.tensors("eagle", dtype=ml_dtypes.bfloat16)
    directory = published.write(tmp_path, "eagle", copies=False)
    (directory / "model.safetensors").unlink()
    as_torch = {
        name: torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        for name, array in given.items()
    }
    torch.save(as_torch, directory / "pytorch_model.bin")
    _, params = drafter_hf.load(directory, TARGET)
    assert params.join.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params.join, given["fc.weight"])


def test_nothing_is_written_of_what_is_refused(tmp_path):
    cfg, params = drafter_hf.load(published.write(tmp_path / "in", "eagle3"), TARGET)
    with pytest.raises(ValueError, match="dtype='int8'; accepted: .*bfloat16"):
        drafter_hf.save(tmp_path / "a", params, cfg, "eagle3", TARGET, dtype="int8")
    with pytest.raises(ValueError, match="does not fit the layout eagle:"):
        drafter_hf.save(tmp_path / "a", params, cfg, "eagle", TARGET)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="not empty"):
        drafter_hf.save(tmp_path / "in", params, cfg, "eagle3", TARGET)
