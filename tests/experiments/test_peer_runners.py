"""The runners that need nothing beyond the test environment."""

import ast
import csv
import sys

import pytest
import torch
import transformers

from experiments import decode_speed, grpo_step_speed, harness
from tlt_jax.models import tokenizer as model_tokenizer

EOS = 2
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\n{% endif %}"
)


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
    runner = harness.Runner(
        harness.System("transformers", sys.executable, script),
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
        tree = ast.parse((harness.PEERS_DIR / script).read_text(encoding="utf-8"))
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
            "--batches=1,3",
            "--new-tokens=5",
            "--rounds=2",
            f"--out={tmp_path}",
        ]
    )
    assert "Not compared (see --peers): llamacpp, vllm." in capsys.readouterr().out
    assert len(summary) == 8  # two batches, two temperatures, two systems
    for row in summary:
        assert row["rounds"] == 2 and row["tokens_per_s/median"] > 0
        if row["system"] == "transformers":
            assert row["tokens_per_s/times"] > 0
            assert row.get("rows_as_ours", row["batch"]) == row["batch"]
    names = ("decode_speed.csv", "decode_speed_summary.csv", "decode_speed.json")
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_grpo_step_speed_runs_alone_with_both_kinds_of_lengths(model_dir, tmp_path):
    summary = grpo_step_speed.main(
        [
            f"--model-dir={model_dir}",
            "--max-new-tokens=4",
            "--rounds=1",
            f"--out={tmp_path}",
        ]
    )
    assert [row["lengths"] for row in summary] == ["fixed", "natural"]
    with (tmp_path / "grpo_step_speed.csv").open(newline="") as file:
        fixed, natural = csv.DictReader(file)
    assert fixed["completion_tokens"] == "64" and fixed["length_mean"] == "4.0"
    for row in (fixed, natural):
        assert float(row["step_s"]) >= float(row["generate_s"]) > 0
        assert float(row["step_s"]) > float(row["compile_s"])
    assert float(fixed["compile_s"]) == 0  # the warm-up round has done it
