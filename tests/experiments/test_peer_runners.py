"""The runners that need nothing beyond the test environment."""

import ast
import csv
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers

from experiments import decode_speed, grpo_step_speed
from experiments.lab import paired
from experiments.peers import prepare_smollm2
from tlt_jax.models.formats import tokenizer as model_tokenizer

EOS = 2
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of torch that wait by spinning stand still on busy machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny random Llama with a tokenizer, as `--model-dir` wants it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = model_tokenizer.from_alphabet(ALPHABET)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            initializer_range=0.3,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
        )
    )
    model.save_pretrained(folder / "hf")
    tokenizer.save(folder / "hf")
    return folder


@pytest.fixture(scope="module")
def runner(model_dir, tmp_path_factory):
    script = decode_speed.PEERS["transformers"]
    runner = paired.Runner(
        paired.System("transformers", sys.executable, script),
        tmp_path_factory.mktemp("logs"),
    )
    runner.ask("load", timeout_s=120, model=str(model_dir / "hf"))
    yield runner
    runner.close()


def ask(runner, prompts, new_tokens, temperature=0.0, seed=0):
    fields = {"prompts": prompts, "new_tokens": new_tokens}
    law = {"temperature": temperature, "seed": seed}
    return runner.ask("run", timeout_s=120, **fields, **law)


def greedy(model, prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_transformers_runner_is_greedy_whatever_the_padding(runner, model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir / "hf").eval()
    prompts = [[5, 9, 7, 30], [40, 41], [8, 60, 61, 62, 63, 64]]
    answer = ask(runner, prompts, 12)
    with torch.no_grad():
        assert answer["tokens"] == [greedy(model, p, 12) for p in prompts]
    assert answer["total_s"] > 0


def test_transformers_runner_samples_by_seed_and_past_the_end_of_sequence(runner):
    prompts = [[5, 9, 7]] * 8
    one, again, other = (ask(runner, prompts, 48, 1.0, s)["tokens"] for s in (1, 1, 2))
    assert one == again != other
    assert {len(row) for row in one} == {48}
    assert any(EOS in row[:-1] for row in one)


@pytest.mark.parametrize("module", [decode_speed, grpo_step_speed])
def test_every_runner_is_there_and_speaks_the_protocol(module):
    for script in (module.OUR_SCRIPT, *module.PEERS.values()):
        tree = ast.parse((paired.PEERS_DIR / script).read_text(encoding="utf-8"))
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "protocol" in imported
        assert ast.get_docstring(tree)


def test_decode_speed_runs_and_finds_greedy_tokens_equal(model_dir, tmp_path, capsys):
    summary = decode_speed.main(
        [
            f"--model-dir={model_dir}",
            "--peers=transformers",
            "--batches=3",
            "--new-tokens=5",
            "--rounds=2",
            f"--out={tmp_path}",
        ]
    )
    assert "Not compared (see --peers): llamacpp, vllm." in capsys.readouterr().out
    assert len(summary) == 4  # two temperatures, two systems
    for row in summary:
        assert row["rounds"] == 2 and row["tokens_per_s/median"] > 0
        if row["system"] == "transformers":
            assert row["tokens_per_s/times"] > 0
            assert row.get("rows_as_ours", row["batch"]) == row["batch"]
    names = ("decode_speed.csv", "decode_speed_summary.csv", "decode_speed.json")
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_grpo_step_speed_runs_alone(model_dir, tmp_path):
    summary = grpo_step_speed.main(
        [
            f"--model-dir={model_dir}",
            "--max-new-tokens=4",
            "--lengths=fixed",
            "--rounds=1",
            f"--out={tmp_path}",
        ]
    )
    assert [row["lengths"] for row in summary] == ["fixed"]
    with (tmp_path / "grpo_step_speed.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["completion_tokens"] == "64" and row["length_mean"] == "4.0"
    assert float(row["step_s"]) >= float(row["generate_s"]) > 0
    assert float(row["compile_s"]) == 0  # the warm-up round has done it


def test_unknown_lengths_are_refused():
    with pytest.raises(ValueError, match="--lengths names long; known are fixed"):
        grpo_step_speed.main(["--lengths=fixed,long"])


def test_f32_gguf_keeps_numbers_and_metadata(tmp_path):
    source, target = tmp_path / "q.gguf", tmp_path / "f32.gguf"
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_tensor(
        "blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1
    )
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()

    prepare_smollm2.write_f32_gguf(source, target)

    reader = gguf.GGUFReader(target)
    assert reader.fields["llama.block_count"].contents() == 3
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    (tensor,) = reader.tensors
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(tensor.data, expected)
    assert not np.array_equal(expected, values)
