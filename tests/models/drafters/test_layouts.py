"""Drafters in the layouts of other projects, in and out, and against what they mean."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.models import published_drafters as published
from tlt_jax.models.drafters import drafter, layouts
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.drafters import io as drafter_io

TARGET = published.TARGET
LAYOUTS = ("eagle", "eagle3", "speculators")
FORWARD = jax.jit(drafter.forward, static_argnums=1)
INIT = jax.jit(drafter.init, static_argnums=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_the_published_ones(layout, tmp_path):
    cfg, _ = drafter_io.load(published.write(tmp_path, layout), TARGET)
    assert layouts.shapes(cfg, layout) == published.SHAPES[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_drafter_is_read_and_written_bit_for_bit(layout, tmp_path):
    given = published.tensors(layout)
    cfg, params = drafter_io.load(
        published.write(tmp_path / "in", layout, given), TARGET
    )
    drafter_hf.save(
        tmp_path / "out", params, cfg, layout, TARGET, dtype="float16", verifier="me"
    )
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(written) == sorted(given)
    for name, array in given.items():
        assert written[name].dtype == array.dtype, name
        assert written[name].tobytes() == array.tobytes(), name
    again, reread = drafter_io.load(tmp_path / "out", TARGET)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, reread, params)


# What an engine reads of each file that we write; other keys are of no effect.
WRITTEN = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": 24,
    "model_type": "llama",
}


def test_written_configs_have_the_published_keys(tmp_path):
    def written(layout):
        source = published.write(tmp_path / "in" / layout, layout)
        cfg, params = drafter_io.load(source, TARGET)
        out = tmp_path / "out" / layout
        drafter_hf.save(out, params, cfg, layout, TARGET, verifier="org/name")
        return json.loads((out / "config.json").read_text())

    eagle, eagle3, speculators = (written(layout) for layout in LAYOUTS)
    eagle_keys = {"architectures": ["LlamaForCausalLMEagle"], "bias": True}
    assert eagle == eagle | WRITTEN | eagle_keys
    sglang = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 11}
    assert eagle3 == eagle3 | WRITTEN | sglang
    # Layers 2, N/2 and N - 3 by their inputs: what loaders take if none are named.
    assert "eagle_config" not in eagle3
    assert "eagle_aux_hidden_state_layer_ids" not in eagle3
    inner = speculators["transformer_layer_config"]
    assert inner == inner | WRITTEN and "architectures" not in inner
    expected = published.CONFIGS["speculators"]
    kept = ("draft_vocab_size", "norm_before_residual", "speculators_model_type")
    kept += ("eagle_aux_hidden_state_layer_ids", "target_hidden_size", "architectures")
    assert [speculators[key] for key in kept] == [expected[key] for key in kept]
    served = expected["speculators_config"] | {
        "verifier": {"name_or_path": "org/name", "architectures": ["Qwen3ForCausalLM"]}
    }
    assert speculators["speculators_config"] == served


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_is_that_of_the_published_architecture(layout, tmp_path):
    """Six positions of a text, then three drafted ones on features of its own."""
    given = published.tensors(layout, dtype=np.float32)
    cfg, params = drafter_io.load(published.write(tmp_path, layout, given), TARGET)
    before = layout == "speculators"
    assert cfg.norm_before_residual == before
    twin = published.Twin(layout, given, before)
    torch.manual_seed(0)
    embedded = torch.randn(9, 16)
    features = torch.randn(6, cfg.num_features * 16)
    target_head = torch.randn(24, 16)

    hidden = [twin(embedded[:6], twin.fuse(features), 0)]
    for t in range(6, 9):
        hidden.append(twin(embedded[t : t + 1], hidden[-1][-1:], t))
    wanted = torch.cat(hidden)
    logits = twin.logits(wanted, target_head).numpy()

    fused = drafter.fuse(params, cfg, published.columns(features))
    inputs, positions = published.columns(embedded), jnp.arange(9)[None]
    here = FORWARD(params, cfg, inputs[..., :6], fused, positions[:, :6])
    ours = [here.hidden]
    keys, values = here.keys, here.values
    for t in range(6, 9):
        now = slice(t, t + 1)
        past = drafter.Past(keys, values, jnp.ones((1, 1, keys.shape[-1]), bool))
        out = FORWARD(
            params,
            cfg,
            inputs[..., now],
            ours[-1][..., -1:],
            positions[:, now],
            past=past,
        )
        ours.append(out.hidden)
        keys = jnp.concatenate([keys, out.keys], axis=-1)
        values = jnp.concatenate([values, out.values], axis=-1)
    ours = jnp.concatenate(ours, axis=-1)
    np.testing.assert_allclose(ours[:, 0].T, wanted.numpy(), rtol=2e-4, atol=2e-5)
    head = drafter_head.head_of(params, jnp.asarray(target_head.numpy()))
    found = drafter_head.logits(params, cfg, head, ours)[0]
    np.testing.assert_allclose(found, logits, rtol=2e-4, atol=5e-5)


def test_layers_are_found_in_every_convention(tmp_path):
    key = "eagle_aux_hidden_state_layer_ids"
    for layout, changes, layers in (
        ("eagle", {}, ()),
        ("eagle3", {}, (1, 3, 4)),
        ("eagle3", {"eagle_config": {key: [1, 3, 6]}}, (1, 3, 6)),
        ("eagle3", {"eagle_config": {key: [2, 4, 5]}}, (1, 3, 4)),
        ("speculators", {}, (1, 3, 6)),
        ("speculators", {key: None}, (1, 3, 4)),
    ):
        directory = published.write(tmp_path, layout, **changes)
        assert drafter_io.read_config(directory, TARGET).feature_layers == layers


def test_torch_files_as_the_authors_publish_them(tmp_path):
    given = published.tensors("eagle", dtype=np.float32)
    directory = published.write(tmp_path, "eagle", given)
    _, wanted = drafter_io.load(directory, TARGET)
    (directory / "model.safetensors").unlink()
    as_torch = {k: torch.from_numpy(v) for k, v in given.items()}
    torch.save(as_torch, directory / "pytorch_model.bin")
    _, params = drafter_io.load(directory, TARGET)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    # Anything but tensors would be run as code.
    torch.save(
        {"fc.weight": pathlib.PurePosixPath("x")}, directory / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match="holds more than tensors"):
        drafter_io.load(directory, TARGET)


def test_what_is_not_computed_here_is_refused_by_name(tmp_path):
    def refused(layout, message, given=None, **changes):
        directory = published.write(tmp_path, layout, given, **changes)
        with pytest.raises(ValueError, match=message):
            drafter_io.load(directory, TARGET)

    refused("eagle3", "num_hidden_layers=2", num_hidden_layers=2)
    refused("eagle3", r"vocab_size=32 \(target: 24\)", vocab_size=32)
    refused("eagle3", "target_hidden_size=32", target_hidden_size=32)
    refused("eagle3", "qkv_bias", attention_bias=True)
    refused("eagle3", "fc_norm=True, which is not computed", fc_norm=True)
    refused("eagle3", "norm_before_fc", eagle_config={"norm_before_fc": True})
    refused("eagle3", "rotary_kind='new'", rotary_kind="new")
    key = "eagle_aux_hidden_state_layer_ids"
    refused("eagle3", r"=\[1, 3, 8\] with a target of 8", **{key: [1, 3, 8]})
    refused("speculators", "'mlp_speculator'", speculators_model_type="mlp_speculator")
    given = published.tensors("eagle3")
    del given["norm.weight"]
    refused("eagle3", "norm.weight is missing", given)
    given = published.tensors("eagle3") | {
        "midlayer.self_attn.q_proj.bias": given["d2t"]
    }
    refused("eagle3", "q_proj.bias has no meaning here", given)
    given = published.tensors("eagle3")
    refused("eagle3", "t2d and d2t", given | {"t2d": ~given["t2d"]})
    refused("eagle3", "do not rise", given | {"d2t": given["d2t"][::-1].copy()})
    refused(
        "eagle3",
        r"fc.weight is \(16, 32\)",
        given | {"fc.weight": given["fc.weight"][:, :32]},
    )
    known = {"tlt_jax": {"target": "llama-L2"}}
    refused("eagle3", "of another target, llama-L2", **known)


def test_what_a_layout_has_no_place_for_is_refused_by_name():
    def refused(layout, message, **settings):
        cfg = drafter.of_target(TARGET, **settings)
        with pytest.raises(ValueError, match=message):
            layouts.check_expressible(cfg, layout, TARGET.num_layers)

    for layout in LAYOUTS:
        refused(layout, "train one with drafter.architecture='eagle", feature_layers=())
        sizes = {"architecture": "block", "block_size": 4}
        refused(layout, "architecture='block' is computed nowhere else", **sizes)
    three = {"architecture": "eagle3", "feature_layers": (1, 3, 4)}
    refused("eagle", "use the layout eagle3 or speculators", **three)
    refused("eagle3", "use the layout eagle", architecture="eagle")
    refused("eagle", "draft_vocab_size=11", architecture="eagle", draft_vocab_size=11)
    refused("eagle3", "mean other layers", **three | {"feature_layers": (2, 4, 5)})
    refused("speculators", "do not rise", **three | {"feature_layers": (4, 3, 1)})
    refused("vllm", "layout='vllm'", **three)
    cfg = drafter.of_target(TARGET, **three)
    for layout in ("eagle3", "speculators"):
        layouts.check_expressible(cfg, layout, 8)
    cfg = dataclasses.replace(cfg, norm_before_residual=True)
    with pytest.raises(ValueError, match="not computed by SGLang"):
        layouts.check_expressible(cfg, "eagle3", 8)


def test_trained_drafter_takes_the_targets_head_along(tmp_path):
    """Ours has no head: engines get the target's rows, and SGLang a bias of zero."""
    three = {"architecture": "eagle3", "feature_layers": (1, 3, 4)}
    cfg = drafter.of_target(TARGET, **three, draft_vocab_size=11, max_length=40)
    ids = jnp.asarray(published.DRAFT_IDS, jnp.int32)
    params = INIT(cfg, jax.random.key(0)).replace(draft_ids=ids)
    assert params.head is None and cfg.layer.family == "llama"
    head = np.arange(11 * 16, dtype=np.float32).reshape(11, 16)
    drafter_hf.save(
        tmp_path / "three", params, cfg, "eagle3", TARGET, head=head, dtype="float32"
    )
    again, read = drafter_io.load(tmp_path / "three", TARGET)
    assert again == dataclasses.replace(cfg, own_head=True)
    jax.tree.map(np.testing.assert_array_equal, read, params.replace(head=head))
    # Our own format keeps it as it is.
    drafter_io.save(tmp_path / "own", params, cfg)
    again, read = drafter_io.load(tmp_path / "own", TARGET)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, read, params)
    cfg = drafter.of_target(TARGET, architecture="eagle")
    params = INIT(cfg, jax.random.key(0))
    drafter_hf.save(tmp_path / "one", params, cfg, "eagle", TARGET, head=head)
    bias = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")[
        "fc.bias"
    ]
    assert bias.shape == (16,) and not bias.any()
