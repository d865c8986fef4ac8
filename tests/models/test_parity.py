"""The forward computes what `transformers` computes, from the weights that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.models import tiny_hf
from tlt_jax.models import attention, transformer
from tlt_jax.models.formats import convert, hf_config, layout

TOLERANCE = dict(rtol=0, atol=1e-4)
NUM_TOKENS = 40  # beyond the original context of the stretched models


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def reference(model, tokens, mask=None, positions=None):
    """Logits `[B, T, V]` and outputs of every layer `[B, T, D]` before any norm."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens),
            attention_mask=None if mask is None else torch.tensor(mask),
            position_ids=None if positions is None else torch.tensor(positions),
        ).logits
    for hook in hooks:
        hook.remove()
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return logits.numpy(), [out.numpy() for out in outputs]


def ours(params, cfg, tokens, positions, visibility=None, dtype=jnp.float32):
    """As `reference`."""

    @jax.jit
    def run(params, tokens, positions):
        out = transformer.forward(
            params,
            cfg,
            tokens,
            positions,
            visibility,
            dtype=dtype,
            features=tuple(range(cfg.num_layers)),
        )
        return transformer.logits(params, out.hidden), out.features

    logits_BTV, features_DBT = run(params, jnp.asarray(tokens), jnp.asarray(positions))
    return (
        np.asarray(logits_BTV),
        [np.moveaxis(np.asarray(x_DBT), 0, -1) for x_DBT in features_DBT],
    )


def some_tokens(batch, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(3, tiny_hf.BASE["vocab_size"], (batch, NUM_TOKENS))


@pytest.mark.parametrize("name", tiny_hf.CASES)
def test_logits_and_every_layer_equal_those_of_transformers(name, tmp_path):
    model = tiny_hf.case(name)
    model.save_pretrained(tmp_path / "theirs")
    cfg = hf_config.read(tmp_path / "theirs")
    params = convert.load(tmp_path / "theirs", cfg)
    tokens = some_tokens(2)
    positions = np.broadcast_to(np.arange(NUM_TOKENS), tokens.shape)

    logits, outputs = reference(model, tokens)
    our_logits, our_outputs = ours(params, cfg, tokens, positions)

    for i, (out, our_out) in enumerate(zip(outputs, our_outputs, strict=True)):
        np.testing.assert_allclose(our_out, out, **TOLERANCE, err_msg=f"layer {i}")
    np.testing.assert_allclose(our_logits, logits, **TOLERANCE)

    convert.save(params, cfg, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert type(again) is type(model)
    np.testing.assert_array_equal(reference(again, tokens)[0], logits)


def by_tensor(model, cfg):
    """Gradients of a mixture by the names of its files, where experts are apart."""
    names, found = layout.hf_names(cfg), {}
    for name, parameter in model.named_parameters():
        grad, kind = parameter.grad.numpy(), name.rpartition(".")[2]
        layer = "".join(name.split(".")[2:3])
        if name.endswith("mlp.gate.weight"):
            found[names["router"].format(layer)] = grad
        elif kind in ("gate_up_proj", "down_proj"):
            roles = kind.removesuffix("_proj").split("_")
            for x, own in enumerate(grad):
                for role, part in zip(roles, np.split(own, len(roles)), strict=True):
                    found[names[f"expert_{role}"].format(layer, x)] = part
        else:
            found[name] = grad
    return found


@pytest.mark.parametrize("name", ["qwen3-moe-plain", "qwen3-moe-tied-shares", "olmoe"])
def test_gradients_of_mixtures_equal_those_of_transformers(name, tmp_path):
    model = tiny_hf.case(name)
    model.save_pretrained(tmp_path)
    cfg = hf_config.read(tmp_path)
    params = convert.load(tmp_path, cfg)
    tokens = some_tokens(2)
    positions = jnp.broadcast_to(jnp.arange(NUM_TOKENS), tokens.shape)
    probe = np.random.default_rng(3).standard_normal((*tokens.shape, cfg.vocab_size))
    probe = (probe / tokens.size).astype(np.float32)

    logits = model(torch.tensor(tokens)).logits
    torch.sum(logits * torch.tensor(probe)).backward()

    @jax.jit
    @jax.grad
    def ours_of(params):
        hidden = transformer.forward(params, cfg, jnp.asarray(tokens), positions).hidden
        return jnp.sum(transformer.logits(params, hidden) * probe)

    found = dict(convert.named_tensors(ours_of(params), cfg))
    expected = by_tensor(model, cfg)
    assert found.keys() == expected.keys()
    for tensor, grad in expected.items():
        np.testing.assert_allclose(found[tensor], grad, **TOLERANCE, err_msg=tensor)
        assert np.abs(grad).max() > 1e-4, tensor


@pytest.mark.parametrize("name", ["llama-tied-llama3", "qwen3-bias-windows-yarn"])
def test_padding_on_the_left_changes_nothing(name, tmp_path):
    model = tiny_hf.case(name)
    model.save_pretrained(tmp_path)
    cfg = hf_config.read(tmp_path)
    params = convert.load(tmp_path, cfg)
    tokens = some_tokens(2, seed=1)
    mask = np.ones_like(tokens)
    mask[1, :9] = 0
    tokens[mask == 0] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)

    logits, outputs = reference(model, tokens, mask, positions)
    segment = jnp.where(mask == 1, 0, -1)
    visibility = attention.Visibility(segment=segment, prefix=segment)
    our_logits, our_outputs = ours(params, cfg, tokens, positions, visibility)

    seen = mask == 1
    np.testing.assert_allclose(our_logits[seen], logits[seen], **TOLERANCE)
    for out, our_out in zip(outputs, our_outputs, strict=True):
        np.testing.assert_allclose(our_out[seen], out[seen], **TOLERANCE)


def test_positions_far_beyond_the_context_equal_those_of_transformers(tmp_path):
    model = tiny_hf.case("llama-tied-llama3")
    model.save_pretrained(tmp_path)
    cfg = hf_config.read(tmp_path)
    params = convert.load(tmp_path, cfg)
    tokens = some_tokens(1)
    positions = 5_000 + np.arange(NUM_TOKENS)[None]

    logits, _ = reference(model, tokens, positions=positions)
    our_logits, _ = ours(params, cfg, tokens, positions)

    np.testing.assert_allclose(our_logits, logits, **TOLERANCE)


def test_bfloat16_logprobs_err_by_little_more_than_rounded_weights_do(tmp_path):
    model = tiny_hf.case("qwen2-yarn")
    model.save_pretrained(tmp_path)
    cfg = hf_config.read(tmp_path)
    params = convert.load(tmp_path, cfg, dtype=jnp.bfloat16)
    tokens = some_tokens(2)
    positions = np.broadcast_to(np.arange(NUM_TOKENS), tokens.shape)

    exact, _ = reference(model, tokens)
    rounded, _ = reference(model.to(torch.bfloat16).float(), tokens)
    logits, _ = ours(params, cfg, tokens, positions, dtype=jnp.bfloat16)

    def logprobs(logits):
        return np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))

    error = np.abs(logprobs(logits) - logprobs(exact))
    weights_only = np.abs(logprobs(rounded) - logprobs(exact))
    assert np.mean(error) < 3 * np.mean(weights_only)
