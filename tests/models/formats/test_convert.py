"""Weights in and out of Hugging Face directories."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.models import tiny_hf
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import convert, hf_config, layout
from tlt_jax.runtime import sharding

CFG = model_config.ModelConfig(
    family="qwen2",
    vocab_size=32,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    tie_embeddings=False,
    qkv_bias=True,
)


def random_params(cfg=CFG, dtype=jnp.float32):
    """Every leaf different from every other, biases and norms too."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        model_params.abstract(cfg, dtype),
    )


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def tensors_of(directory):
    return safetensors.numpy.load_file(os.path.join(directory, "model.safetensors"))


def rewrite(directory, tensors):
    path = os.path.join(directory, "model.safetensors")
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    """A directory with `random_params()` and a way to change its tensors."""
    convert.save(random_params(), CFG, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", convert.DTYPES)
@pytest.mark.parametrize("stacked", [True, False])
def test_a_round_trip_is_exact(dtype, stacked, tmp_path):
    params = random_params(dtype=jnp.dtype(dtype))
    given = params if stacked else model_params.unstack(params)
    convert.save(given, CFG, tmp_path / "model", dtype=dtype)
    assert hf_config.read(tmp_path / "model") == CFG
    loaded = convert.load(tmp_path / "model", CFG, dtype=jnp.dtype(dtype))
    assert loaded.embed.dtype == jnp.dtype(dtype)
    assert_equal(loaded, params)


def test_fused_blocks_hold_the_heads_that_they_should(tmp_path):
    model = tiny_hf.build("llama", attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path)
    cfg = hf_config.read(tmp_path)
    params = convert.load(tmp_path, cfg)
    layer = model.model.layers[2]
    attention, mlp = layer.self_attn, layer.mlp
    k, g, h, d = cfg.num_kv_heads, cfg.heads_per_kv, cfg.head_dim, cfg.d_model

    def theirs(parameter):
        return parameter.detach().numpy()

    for kv in range(k):
        for i in range(g):
            head = (kv * g + i) * h
            rows = theirs(attention.q_proj.weight)[head : head + h]
            np.testing.assert_array_equal(params.layers.qkv[2, kv, i], rows)
        rows = slice(kv * h, kv * h + h)
        key, value = attention.k_proj, attention.v_proj
        np.testing.assert_array_equal(
            params.layers.qkv[2, kv, g], theirs(key.weight)[rows]
        )
        np.testing.assert_array_equal(
            params.layers.qkv[2, kv, g + 1], theirs(value.weight)[rows]
        )
        np.testing.assert_array_equal(
            params.layers.qkv_bias[2, kv, g + 1], theirs(value.bias)[rows]
        )
    np.testing.assert_array_equal(
        params.layers.out[2], theirs(attention.o_proj.weight).reshape(d, k, g, h)
    )
    np.testing.assert_array_equal(
        params.layers.gate_up[2, 1], theirs(mlp.up_proj.weight)
    )
    np.testing.assert_array_equal(
        params.layers.gate_up_bias[2, 0], theirs(mlp.gate_proj.bias)
    )


def test_weights_split_over_files_load_as_from_one(saved, tmp_path):
    convert.save(random_params(), CFG, tmp_path / "split", max_shard_bytes=5000)
    files = [f for f in os.listdir(tmp_path / "split") if f.endswith(".safetensors")]
    assert len(files) > 3
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / "split" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 5000
    assert_equal(convert.load(tmp_path / "split", CFG), random_params())


@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 1, 4), (1, 8, 1)])
def test_shards_are_those_of_the_whole(saved, mesh):
    shardings = sharding.tree_shardings(
        sharding.make_mesh(*mesh),
        sharding.ShardingRules(),
        model_params.logical_axes(CFG),
        model_params.abstract(CFG),
    )
    params = convert.load(saved, CFG, shardings=shardings)
    jax.tree.map(lambda leaf, s: leaf.sharding == s or pytest.fail(), params, shardings)
    assert_equal(params, random_params())


class Recording:
    """A source that counts the numbers that are read of it."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.num_read = 0

    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name, index):
        block = self.tensors[name][index]
        self.num_read += block.size
        return block


def test_only_the_slices_of_the_shards_held_are_read(saved):
    source = Recording(tensors_of(saved))
    leaves = layout.layout(CFG, layout.HF_NAMES)
    shardings = sharding.tree_shardings(
        sharding.make_mesh(2, 2, 2),
        sharding.ShardingRules(),
        model_params.logical_axes(CFG),
    )
    layout.assemble(leaves, source, shardings=shardings)
    # Two copies over `data` are read once; vectors are held by every device.
    assert source.num_read == model_params.count(CFG)

    source.num_read = 0
    index = (slice(0, 2), slice(2, 3), slice(0, 4), slice(0, 6), slice(4, 8))
    block = layout.read(leaves.layers.qkv, source, index, jnp.float32)
    assert source.num_read == block.size
    np.testing.assert_array_equal(block, random_params().layers.qkv[index])


def test_any_slice_of_any_leaf_is_that_slice_of_the_whole(saved):
    source = Recording(tensors_of(saved))
    rng = np.random.default_rng(0)

    def check(leaf, whole):
        for _ in range(10):
            ends = [sorted(rng.integers(0, n + 1, 2)) for n in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            block = layout.read(leaf, source, index, jnp.float32)
            np.testing.assert_array_equal(block, whole[index])

    leaves = layout.layout(CFG, layout.HF_NAMES)
    jax.tree.map(check, leaves, jax.tree.map(np.asarray, random_params()))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda t: t.update(extra=np.zeros(3)), "surplus extra"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(17, np.float32)}),
            r"model.norm.weight is \(17,\), not \(16,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}),
            "model.norm.weight in .* is I8; accepted",
        ),
        (lambda t: t.pop("lm_head.weight"), "missing lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    tensors = tensors_of(saved)
    change(tensors)
    rewrite(saved, tensors)
    with pytest.raises(ValueError, match=message):
        convert.load(saved, CFG)


def test_rotary_buffers_and_a_copy_of_a_tied_head_are_no_surplus(saved):
    tensors = tensors_of(saved)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    rewrite(saved, tensors)
    tied = hf_config.from_hf(hf_config.to_hf(CFG) | dict(tie_word_embeddings=True))
    assert convert.load(saved, tied).lm_head is None
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    rewrite(saved, tensors)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        convert.load(saved, tied)


def test_damaged_and_missing_files_are_named(saved, tmp_path):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for cut in (len(whole) - 8, 100, 4, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="model.safetensors is truncated"):
            convert.load(saved, CFG)
    path.unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        convert.load(saved, CFG)

    convert.save(random_params(), CFG, tmp_path / "split", max_shard_bytes=5000)
    index_path = tmp_path / "split" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = index["weight_map"]["model.norm.weight"]
    for file, message in ((first[1:], "is missing"), ("../x", "outside its directory")):
        changed = index["weight_map"] | {"model.norm.weight": file}
        index_path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            convert.load(tmp_path / "split", CFG)
    changed = {k: v for k, v in index["weight_map"].items() if "norm" not in k}
    index_path.write_text(json.dumps({"weight_map": changed}))
    with pytest.raises(ValueError, match="does not hold what the index says"):
        convert.load(tmp_path / "split", CFG)


def test_one_file_beside_the_parts_of_an_older_model_is_refused(tmp_path):
    convert.save(random_params(), CFG, tmp_path / "one")
    convert.save(random_params(), CFG, tmp_path / "split", max_shard_bytes=5000)
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "split")
    with pytest.raises(ValueError, match="model.safetensors and an index of other fil"):
        convert.load(tmp_path / "split", CFG)


def test_nothing_is_overwritten(saved):
    with pytest.raises(ValueError, match="not empty"):
        convert.save(random_params(), CFG, saved)
    with pytest.raises(ValueError, match="dtype='int8'"):
        convert.save(random_params(), CFG, saved, dtype="int8")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match="could not write .*No space left"):
            convert.save(random_params(), CFG, tmp_path / "model")
    assert os.listdir(tmp_path) == []
    usage = type("Usage", (), dict(free=10))
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="needs .* GB"):
        convert.save(random_params(), CFG, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_tokenizer_files_are_copied(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
    convert.save(random_params(), CFG, tmp_path / "model", tmp_path / "tokenizer")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "model" / "notes.txt").exists()
