"""Damaged files are read without a finding; what fuzzing found stays mended."""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import pytest

from tests.fuzzing import campaign, seeds, targets
from tlt_jax.models.formats import hf_config
from tlt_jax.viz import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES_OF_A_KIND = 120


def command(out, cases):
    """Run the command: its children are forked from a process without threads."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", f"--cases={cases}", f"--out={out}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    path = out / "summary.json"
    assert path.exists(), ran.stdout + ran.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    cases = CASES_OF_A_KIND * len(seeds.KINDS)
    return command(tmp_path_factory.mktemp("fuzzing"), cases)


@pytest.mark.parametrize("kind", seeds.KINDS)
def test_damaged_files_end_in_one_line(summary, kind):
    found = summary[kind]
    assert found["findings"] == []
    assert found["cases"] == CASES_OF_A_KIND
    # Rows of text are refused one by one.
    assert found["refused"] > 20 or kind in ("jsonl", "csv")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand(tmp_path):
    found = command(tmp_path, 10_000)
    assert {kind: one["findings"] for kind, one in found.items()} == {
        kind: [] for kind in seeds.KINDS
    }
    assert sum(one["cases"] for one in found.values()) == 10_000


def test_only_errors_of_the_package_itself_are_accepted(tmp_path):
    def judged(read):
        with pytest.raises(ValueError) as caught:
            read()
        return campaign._judge(caught.value)

    assert judged(lambda: hf_config.read(tmp_path)) == "refused"
    assert judged(lambda: json.loads("{")).startswith("JSONDecodeError at decoder.py")
    (tmp_path / ("x" * 200)).mkdir()
    for _ in range(6):
        tmp_path /= "x" * 200
    assert "a message of 1" in judged(lambda: hf_config.read(tmp_path))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid") / "seeds"
    seeds.write(root)
    return root


def in_json(**changes):
    def edit(content):
        return json.dumps(json.loads(content) | changes).encode()

    return edit


def replaced(old, new):
    def edit(content):
        assert content.count(old) >= 1
        return content.replace(old, new, 1)

    return edit


def in_header(edit):
    """Change the header of a safetensors file."""

    def whole(content):
        (length,) = struct.unpack("<Q", content[:8])
        header = edit(content[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return whole


def twice(content):
    """Say the first tensor's name again, with its entry."""
    found = json.loads(content)
    name = next(key for key in found if key != "__metadata__")
    again = f", {json.dumps(name)}: {json.dumps(found[name])}}}"
    return content.rstrip()[:-1] + again.encode()


def not_finite(content):
    return content[:-4] + struct.pack("<f", float("nan"))


# Kind, variant, file, what is done to it, what is said.
FOUND = [
    (
        "config",
        "llama",
        "config.json",
        in_json(num_hidden_layers=2**20),
        "at most 1024",
    ),
    ("config", "llama", "config.json", in_json(hidden_size=-8), "hidden_size=-8"),
    ("config", "llama", "config.json", in_json(vocab_size=1e12), "at most 2147483647"),
    (
        "config",
        "llama",
        "config.json",
        in_json(bos_token_id=False),
        "bos_token_id=False",
    ),
    (
        "config",
        "llama",
        "generation_config.json",
        in_json(pad_token_id=27),
        "pad_id contains .27",
    ),
    ("config", "llama", "config.json", in_json(rms_norm_eps=1.5), "rms_norm_eps=1.5"),
    (
        "config",
        "llama",
        "config.json",
        in_json(architectures=[[]]),
        r"architectures=\[\]",
    ),
    ("config", "qwen2", "config.json", in_json(layer_types=3), "layer_types=3"),
    ("config", "qwen2", "config.json", in_json(layer_types=[{}, []]), "layer_types="),
    (
        "config",
        "llama",
        "config.json",
        lambda x: x[:-3] + b', "dtype": 1}',
        "'dtype' twice",
    ),
    (
        "config",
        "llama",
        "generation_config.json",
        in_json(eos_token_id=[{}]),
        "eos_token",
    ),
    (
        "config",
        "qwen3",
        "config.json",
        in_json(rope_parameters={"rope_type": []}),
        "rope",
    ),
    (
        "tokenizer",
        "bytes",
        "tokenizer_config.json",
        in_json(eos_token=[1]),
        r"eos_token=\[1",
    ),
    (
        "tokenizer",
        "bytes",
        "tokenizer_config.json",
        in_json(chat_template=3),
        "template=3",
    ),
    (
        "template",
        "plain",
        "chat_template.jinja",
        lambda x: x + b"\xff",
        "cannot be read",
    ),
    (
        "template",
        "plain",
        "chat_template.jinja",
        lambda x: b"{{ 1/0 }}",
        "ZeroDivision",
    ),
    ("safetensors", "tied", "model.safetensors", in_header(twice), "twice"),
    ("safetensors", "tied", "model.safetensors", not_finite, "that are not finite"),
    (
        "index",
        "shards",
        "model.safetensors.index.json",
        in_json(weight_map={"x": ".."}),
        "outside its",
    ),
    (
        "index",
        "shards",
        "model.safetensors.index.json",
        in_json(weight_map={"x": "../../../etc/passwd"}),
        "passwd., outside its directory",
    ),
    ("index", "shards", "model.safetensors", lambda _: b"", "an index of other files"),
    ("gguf", "llama", "model.gguf", not_finite, "that are not finite"),
    ("gguf", "llama", "model.gguf", lambda x: x[:-1], "bytes are missing at its end"),
    ("drafter", "all", "config.json", in_json(output_norm="no"), "output_norm"),
    ("drafter", "all", "config.json", in_json(max_length="1"), "max_length"),
    (
        "drafter",
        "all",
        "config.json",
        lambda x: x[:-3] + b', "about": 1}',
        "'about' twice",
    ),
    (
        "drafter",
        "some",
        "config.json",
        in_json(feature_layers=[True, 4]),
        "feature_layers",
    ),
    (
        "drafter",
        "published",
        "config.json",
        in_json(feature_layers=[1, 3, 8]),
        "names .8",
    ),
    ("drafter", "block", "config.json", in_json(block_size="3"), "block_size=3 is no"),
    (
        "drafter",
        "block",
        "config.json",
        in_json(block_size=4),
        "block.masks is .2, 8. and should be .3, 8",
    ),
    ("drafter", "all", "drafter.safetensors", not_finite, "tau nan"),
    (
        "eagle",
        "one",
        "config.json",
        in_json(tlt_jax=3),
        "tlt_jax=3, which is no JSON object",
    ),
    ("eagle", "one", "model.safetensors", in_header(twice), "twice"),
    (
        "eagle3",
        "one",
        "model.safetensors",
        in_header(replaced(b'"F32"', b'"I32"')),
        "is int32",
    ),
    (
        "eagle3",
        "one",
        "config.json",
        in_json(draft_vocab_size="5"),
        "draft_vocab_size='5'",
    ),
    ("jsonl", "rows", "data.jsonl", lambda x: b"[" * 9**5 + x, "nest too deep"),
    (
        "jsonl",
        "rows",
        "data.jsonl",
        lambda x: b'{"prompt": "a", "prompt": "b"}\n',
        "'prompt' twice",
    ),
    (
        "parquet",
        "rows",
        "data.parquet",
        lambda x: x[:40] + b"\xff" * 9 + x[49:],
        "cannot be read",
    ),
    (
        "arrow",
        "saved",
        "state.json",
        in_json(_data_files=[{"filename": "../../../etc/passwd"}]),
        "no file beside it: refused",
    ),
    ("arrow", "splits", "dataset_dict.json", in_json(splits=[".."]), "no directories"),
    ("arrow", "splits", "dataset_dict.json", in_json(splits=3.5), "no directories"),
    (
        "records",
        "run",
        "metrics.jsonl",
        replaced(b'"step": 1', b'"step": 0'),
        "line 2 is damaged",
    ),
    (
        "records",
        "run",
        "metrics.jsonl",
        replaced(b'"step": 0', b'"step": -1'),
        "line 1 is",
    ),
]


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_was_found_is_one_line(valid, tmp_path, number):
    kind, variant, name, edit, message = FOUND[number]
    directory = tmp_path / "case"
    shutil.copytree(valid / kind / variant, directory)
    path = directory / name
    path.write_bytes(edit(path.read_bytes() if path.exists() else b""))
    if kind == "jsonl":
        # Its rows are refused one by one.
        found = [f for f in targets.examples.scan(path) if f.example is None]
        assert message in found[0].problem
        return
    with pytest.raises((ValueError, campaign.failures.UserError), match=message) as e:
        targets.READERS[kind](directory)
    assert campaign._judge(e.value) == "refused"


@pytest.mark.parametrize("kind", seeds.KINDS)
def test_valid_files_are_read(valid, kind):
    for variant in (valid / kind).iterdir():
        targets.READERS[kind](variant)


def test_what_a_record_may_lack_ends_no_report(valid, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(valid / "records" / "run", run)
    path = run / "rollouts" / "step_000002.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, name in zip(rows, ("answer", "example_id", "tokens"), strict=False):
        del row[name]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    step, answers, num_unread = report.sample_answers(run, 9)
    # Without tokens there is nothing that could have been drafted.
    assert (step, len(answers), num_unread) == (2, 3, 2)
    assert sorted(str(answer.reference) for answer in answers) == ["2", "2", "None"]
