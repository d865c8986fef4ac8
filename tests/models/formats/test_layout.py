"""Which tensor of a file fills which block of which leaf: every element, once."""

import jax
import numpy as np
import pytest

from tlt_jax.models import config as model_config
from tlt_jax.models.formats import layout

# All sizes different.
CFG = model_config.ModelConfig(
    family="qwen3",
    vocab_size=11,
    num_layers=2,
    d_model=5,
    d_ff=7,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
)
ROLES = (
    "attn_norm q k v q_bias k_bias v_bias q_norm k_norm out out_bias mlp_norm gate up "
    "gate_bias up_bias down down_bias"
).split()
NAMES = {role: f"{role}.{{}}" for role in ROLES}
NAMES |= {role: role for role in ("embed", "final_norm", "lm_head")}


class Arrays:
    """A source that notes what is read of it."""

    def __init__(self, arrays):
        self.arrays, self.reads = arrays, []

    def shapes(self):
        return {name: array.shape for name, array in self.arrays.items()}

    def read(self, name, index):
        self.reads.append((name, index))
        return self.arrays[name][index]


def numbered():
    """Every tensor, with numbers that occur once."""
    leaves = layout.layout(CFG, NAMES)
    arrays, start = {}, 0
    for leaf in jax.tree.leaves(leaves):
        for piece in leaf.pieces:
            size = int(np.prod(piece.shape))
            numbers = np.arange(start, start + size, dtype=np.float32)
            arrays[piece.name] = numbers.reshape(piece.shape)
            start += size
    return leaves, Arrays(arrays)


def test_pieces_fill_every_leaf_once():
    leaves, source = numbered()
    params = layout.assemble(leaves, source)
    numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    total = sum(array.size for array in source.arrays.values())
    np.testing.assert_array_equal(np.sort(numbers), np.arange(total))
    # [K, G + 2, H, D]: of each kv head three queries, its key and its value.
    layers, given = params.layers, source.arrays
    query = given["q.1"].reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(layers.qkv[1, :, :3], query)
    np.testing.assert_array_equal(layers.qkv[1, :, 3], given["k.1"].reshape(2, 4, 5))
    np.testing.assert_array_equal(layers.qkv_bias[0, 1, 4], given["v_bias.0"][4:])
    np.testing.assert_array_equal(layers.gate_up[0, 1], given["up.0"])
    np.testing.assert_array_equal(layers.out[1, :, 1, 2], given["out.1"][:, 20:24])
    np.testing.assert_array_equal(params.lm_head, given["lm_head"])


def test_a_slice_reads_no_more_than_it_needs():
    leaves, source = numbered()
    whole = layout.assemble(leaves, source)
    source.reads.clear()
    index = (slice(1, 2), slice(1, 2), slice(0, 3), slice(1, 3), slice(0, 5))
    part = layout.read(leaves.layers.qkv, source, index, "float32")
    np.testing.assert_array_equal(part, whole.layers.qkv[index])
    # The queries of the second kv head alone, whole heads of them.
    assert source.reads == [("q.1", (slice(12, 24), slice(0, 5)))]


def test_tensors_that_do_not_belong_are_named():
    leaves, source = numbered()
    source.arrays["up.2"] = source.arrays.pop("up.1")
    with pytest.raises(ValueError, match="missing up.1; surplus up.2"):
        layout.assemble(leaves, source)
    leaves, source = numbered()
    source.arrays["down.1"] = source.arrays["down.1"].T
    with pytest.raises(ValueError, match=r"down.1 is \(7, 5\), not \(5, 7\)"):
        layout.assemble(leaves, source)
    assert layout.some(["a", "b", "c"], 2) == "a, b and 1 more"
