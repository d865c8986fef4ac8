"""GGUF files, written here by the `gguf` package as converters write them."""

import gguf
import numpy as np
import pytest

from tests.models import tiny_hf
from tlt_jax.models.config import RopeScaling
from tlt_jax.models.formats import (
    convert,
    gguf_file,
    hf_config,
    layout,
    source,
    tokenizer,
)

# As byte-level vocabularies spell them: Ġ is a space, Ċ a newline.
TOKENS = ["<|end|>", "<|begin|>", *"abc0123.", "Ġ", "Ċ", "ab", "ĊĊ", "Ġ1", "12", "Ġa"]
MERGES = ["a b", "Ċ Ċ", "Ġ 1", "1 2", "Ġ a"]
CONTROL, NORMAL, USER = (
    gguf.TokenType.CONTROL,
    gguf.TokenType.NORMAL,
    gguf.TokenType.USER_DEFINED,
)


def permuted(rows, num_heads):
    """Order rows as llama.cpp does: the two of a rotated pair are neighbours."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, model, quantize=None, metadata=(), tensors=(), pre="smollm", skip=()):
    """Write `model` as a converter does.

    Args:
      quantize: type of the matrices, None for F32.
      metadata: pairs that are added to, or replace, what the model gives.
      tensors: pairs that are added.
      skip: names of metadata and tensors that are left out.
    """
    config, arch = model.config, model.config.model_type.replace("_moe", "moe")
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if arch == "qwen3moe":
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    values |= dict(metadata)
    if "split.count" in values:
        writer.add_uint16("split.count", values.pop("split.count"))
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    tokens = TOKENS + [f"[{i}]" for i in range(len(TOKENS), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 3), USER]  # the last: <[60]>
    )
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token("add_bos" in skip)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    roles = {name: role for role, name in layout.HF_NAMES.items()}
    for name, parameter in _apart(model):
        parts = name.split(".")
        layer = parts[2] if parts[1] == "layers" else ""
        if layer:
            parts[2] = "{}"
        role = roles[".".join(parts)]
        tensor = np.ascontiguousarray(parameter.detach().numpy())
        if arch == "llama" and role in ("q", "q_bias"):
            tensor = permuted(tensor, config.num_attention_heads)
        if arch == "llama" and role in ("k", "k_bias"):
            tensor = permuted(tensor, config.num_key_value_heads)
        name = layout.GGUF_NAMES[role].format(layer)
        if name in skip:
            continue
        if quantize is not None and tensor.ndim == 2:
            data = gguf.quantize(tensor, quantize)
            writer.add_tensor(name, data, raw_dtype=quantize)
        else:
            writer.add_tensor(name, tensor)
    for name, tensor in tensors:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_file.GGUFFile(path)


def _apart(model):
    """Parameters, those of all experts under the name of one, gate and up apart."""
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            gate, up = parameter.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            yield f"{stem}{{}}.gate_proj.weight", gate
            yield f"{stem}{{}}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            yield name.replace("down_proj", "{}.down_proj.weight"), parameter
        else:
            yield name, parameter


def same_config(cfg, expected, model):
    """Equal but for the special tokens, which the file has of its own."""
    assert (cfg.bos_id, cfg.eos_ids, cfg.pad_id) == (1, (0,), 0)
    theirs = hf_config.to_hf(expected) | dict(eos_token_id=0, bos_token_id=1)
    assert hf_config.to_hf(cfg) == theirs | dict(pad_token_id=0)


@pytest.mark.parametrize(
    "family,overrides",
    [
        ("llama", dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5)),
        ("llama", dict(tie_word_embeddings=True, head_dim=6)),
        ("qwen2", {}),
        ("qwen3", dict(tie_word_embeddings=True, num_key_value_heads=1)),
        ("qwen3_moe", tiny_hf.EXPERTS),
    ],
)
def test_a_file_holds_the_model_that_was_written(family, overrides, tmp_path):
    model = tiny_hf.build(family, **overrides)
    model.save_pretrained(tmp_path)
    expected = hf_config.read(tmp_path)
    file = write(tmp_path / "model.gguf", model)
    same_config(file.config, expected, model)
    ours, theirs = file.load(), convert.load(tmp_path, expected)
    for name in ("embed", "final_norm", "lm_head"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for name, leaf in vars(theirs.layers).items():
        np.testing.assert_array_equal(getattr(ours.layers, name), leaf, err_msg=name)


@pytest.mark.parametrize("type_,error", [("Q8_0", 0.01), ("Q4_1", 0.15), ("F16", 1e-3)])
def test_quantised_matrices_are_dequantised(type_, error, tmp_path):
    model = tiny_hf.build(
        "llama", hidden_size=64, intermediate_size=32, num_hidden_layers=1, head_dim=16
    )
    file = write(
        tmp_path / "model.gguf", model, getattr(gguf.GGMLQuantizationType, type_)
    )
    exact = write(tmp_path / "exact.gguf", model).load()
    params = file.load()
    assert not np.array_equal(params.embed, exact.embed)
    for leaf in ("qkv", "out", "gate_up", "down"):
        difference = getattr(params.layers, leaf) - getattr(exact.layers, leaf)
        spread = np.std(getattr(exact.layers, leaf))
        assert 0 < np.sqrt(np.mean(difference**2)) < error * spread


def test_llama3_scaling_is_recognised_by_its_table(tmp_path):
    model = tiny_hf.build("llama", num_hidden_layers=1, head_dim=64)
    theta = 500000.0
    model.config.rope_parameters["rope_theta"] = theta
    released = transformers_divisors(theta, head_dim=64)
    table = [("rope_freqs.weight", released)]
    file = write(tmp_path / "a.gguf", model, tensors=table)
    assert file.config.rope_scaling == RopeScaling("llama3", 8.0, 8192)
    file.load()
    table = [("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))]
    with pytest.raises(ValueError, match="not the table of a Llama 3 model"):
        write(tmp_path / "b.gguf", model, tensors=table).config  # noqa: B018


def transformers_divisors(theta, head_dim):
    """Divisors of the frequencies as `transformers` computes them."""
    import transformers
    from transformers.models.llama import modeling_llama

    scaled = dict(
        rope_type="llama3",
        rope_theta=theta,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=scaled)
    rotary = modeling_llama.LlamaRotaryEmbedding(config)
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return (plain / rotary.inv_freq.numpy()).astype(np.float32)


def test_yarn_and_linear_scaling_are_read(tmp_path):
    model = tiny_hf.build("qwen2", num_hidden_layers=1)
    settings = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
    }
    file = write(tmp_path / "a.gguf", model, metadata=settings.items())
    assert file.config.rope_scaling == RopeScaling("yarn", 4.0, 16)
    settings = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    file = write(tmp_path / "b.gguf", model, metadata=settings.items())
    assert file.config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(metadata=[("attention.sliding_window", 64)]), "sliding_window=64"),
        (dict(metadata=[("expert_count", 8)]), "expert_count=8"),
        (dict(metadata=[("rope.dimension_count", 4)]), "rope.dimension_count=4"),
        (dict(metadata=[("rope.scaling.type", "longrope")]), "longrope|factor"),
        (dict(metadata=[("split.count", 2)]), "is one of 2 parts of a model"),
        (dict(skip=["block_count"]), "no metadata block_count"),
        (dict(skip=["blk.1.ffn_up.weight"]), "missing blk.1.ffn_up.weight"),
        (dict(tensors=[("blk.0.x", np.ones(3, np.float32))]), "surplus blk.0.x"),
        (dict(skip=["token_embd.weight"]), "no tensor token_embd.weight"),
        (dict(pre="jais"), "tokenizer.ggml.pre='jais'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message, tmp_path):
    model = tiny_hf.build("qwen2", num_hidden_layers=2)
    file = write(tmp_path / "model.gguf", model, **changes)
    with pytest.raises(ValueError, match=message):
        file.load()
        file.tokenizer()


def test_files_that_are_missing_cut_or_of_another_kind_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="model.gguf does not exist"):
        gguf_file.GGUFFile(path)
    write(path, tiny_hf.build("llama", num_hidden_layers=1))
    whole = path.read_bytes()
    for content in (whole[:-400], whole[:1000], whole[:3], b"", b"PK" + whole[2:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.gguf is truncated or not a GGUF"):
            gguf_file.GGUFFile(path)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = gguf_file.GGUFFile(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="architecture='gemma2'.*llama, qwen2, qwen3"):
        file.config  # noqa: B018


def text_of(tok, text):
    return [tok.backend.id_to_token(int(i)) for i in tok.encode(text)]


@pytest.mark.parametrize(
    "pre,text,expected",
    [
        # Digits are isolated first, so whitespace before one is a word of its own.
        ("smollm", "\n\n1 12", ["ĊĊ", "1", "Ġ", "1", "2"]),
        ("gpt-2", "\n\n1 12", ["Ċ", "Ċ", "1", "Ġ1", "2"]),
        ("qwen2", "\n\n1 12", ["ĊĊ", "1", "Ġ", "1", "2"]),
        ("llama-bpe", "\n\n1 12", ["ĊĊ", "1", "Ġ", "12"]),
        ("smollm", "ab a<|end|>[60]", ["ab", "Ġa", "<|end|>", "[60]"]),
    ],
)
def test_text_is_split_as_the_pre_tokenizer_says(pre, text, expected, tmp_path):
    model = tiny_hf.build("llama", num_hidden_layers=1)
    tok = write(tmp_path / "model.gguf", model, pre=pre).tokenizer()
    assert text_of(tok, text) == expected
    assert tok.decode(tok.encode("ab a\n1")) == "ab a\n1"
    assert (tok.bos_id, tok.eos_ids, tok.pad_id) == (1, (0,), 0)
    assert tok.encode_prompt([{"role": "user", "content": "ab"}]).tolist() == [12]
    tok.save(tmp_path)
    assert text_of(tokenizer.from_directory(tmp_path), text) == expected


def test_bos_is_added_where_the_file_says_so(tmp_path):
    model = tiny_hf.build("llama", num_hidden_layers=1)
    tok = write(tmp_path / "model.gguf", model, skip=["add_bos"]).tokenizer()
    assert text_of(tok, "ab") == ["<|begin|>", "ab"]
    assert tok.encode("ab", add_special_tokens=False).tolist() == [12]


@pytest.mark.slow
def test_smollm2_speaks_as_in_transformers(tmp_path):
    """Greedy text of the real weights, through our export, in both programs."""
    import jax
    import torch
    import transformers

    from tlt_jax.models import transformer

    model = source.resolve(source.SMOLLM2)
    params, tok = model.load(), model.tokenizer()
    tok.save(tmp_path / "tokenizer")
    convert.save(params, model.config, tmp_path / "out", tmp_path / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")

    messages = [{"role": "user", "content": "What is 17+25?\n\n5 is  a digit."}]
    prompt = tok.encode_prompt(messages)
    their_prompt = their_tok.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert prompt.tolist() == their_prompt[0].tolist()
    with torch.no_grad():
        their_ids = theirs.generate(their_prompt, max_new_tokens=12, do_sample=False)[0]

    @jax.jit
    def logits(params, tokens):
        positions = np.arange(tokens.shape[1])[None]
        hidden = transformer.forward(params, model.config, tokens, positions).hidden
        return transformer.logits(params, hidden)

    ids = their_ids.numpy()
    greedy = np.asarray(logits(params, ids[None]))[0].argmax(-1)
    assert greedy[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :].tolist()
    assert tok.decode(ids) == their_tok.decode(ids, skip_special_tokens=True)
    assert "42" in tok.decode(ids) or "17" in tok.decode(ids)
