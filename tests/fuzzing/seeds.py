"""Valid files of every kind, as small as they may be: what gets damaged."""

import json
import os
import pathlib
import shutil

import gguf
import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import convert, hf_config, layout
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.workdir import metrics

ALPHABET = "0123456789+-*= abcdefu?:"
MODEL = model_config.ModelConfig(
    family="llama",
    vocab_size=27,
    num_layers=2,
    d_model=8,
    d_ff=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=True,
    max_positions=64,
    bos_id=1,
    eos_ids=(2,),
    pad_id=0,
)
# Deep enough for the three layers that EAGLE-3 reads.
TARGET = model_config.ModelConfig(
    family="qwen3",
    vocab_size=24,
    num_layers=8,
    d_model=8,
    d_ff=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=True,
    qk_norm=True,
    eos_ids=(3,),
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
_DRAFT_IDS = np.array([0, 3, 4, 9, 20], np.int32)
MESSAGES = ({"role": "user", "content": "1+2="},)
ROWS = [
    {"prompt": f"{i}+1=", "answer": str(i + 1), "id": f"e{i}", "level": i}
    for i in range(6)
]


def write(root: pathlib.Path) -> None:
    """Write `root/KIND/VARIANT/FILES` for every kind."""
    for kind, make in _MAKERS.items():
        (root / kind).mkdir(parents=True)
        make(root / kind)


def _config(root):
    yarn = model_config.RopeScaling("yarn", 4.0, 16, attention_factor=1.3)
    llama3 = model_config.RopeScaling("llama3", 8.0, 32)
    windows = dict(sliding_window=5, windowed_layers=(True, False))
    qwen2 = dict(family="qwen2", qkv_bias=True, eos_ids=(1, 2))
    variants = {
        "llama": dict(rope_scaling=llama3),
        "qwen2": qwen2 | windows,
        "qwen3": dict(family="qwen3", qk_norm=True, rope_scaling=yarn),
    }
    for name, changes in variants.items():
        cfg = _replace(MODEL, **changes)
        (root / name).mkdir()
        convert.write_json(root / name, "config.json", hf_config.to_hf(cfg))
        generation = hf_config.to_hf_generation(cfg)
        convert.write_json(root / name, "generation_config.json", generation)


def _tokenizer(root):
    model_tokenizer.from_alphabet(ALPHABET).save(root / "letters")
    backend = _byte_level()
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
    made = model_tokenizer.Tokenizer(backend, config, TEMPLATE)
    made.save(root / "bytes")
    (root / "bytes" / "chat_template.jinja").unlink()


def _template(root):
    model_tokenizer.from_alphabet(ALPHABET).save(root / "plain")
    (root / "plain" / "chat_template.jinja").write_text(TEMPLATE)


def _byte_level():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab", "abc"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return backend


def _weights(root):
    for name, changes in (("tied", {}), ("head", {"tie_embeddings": False})):
        cfg = _replace(MODEL, **changes)
        convert.save(_params(cfg), cfg, root / name)


def _index(root):
    convert.save(_params(MODEL), MODEL, root / "shards", max_shard_bytes=1500)
    assert len(list((root / "shards").glob("*.safetensors"))) > 2


def _gguf(root):
    for name, family in (("llama", "llama"), ("qwen3", "qwen3")):
        cfg = _replace(MODEL, family=family, qk_norm=family == "qwen3")
        (root / name).mkdir()
        write_gguf(root / name / "model.gguf", cfg)


def write_gguf(path, cfg, **more):
    """Write a model with its tokenizer as converters do; `more` is metadata."""
    writer = gguf.GGUFWriter(path, cfg.family)
    values = {
        "block_count": cfg.num_layers,
        "context_length": cfg.max_positions,
        "embedding_length": cfg.d_model,
        "feed_forward_length": cfg.d_ff,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
    }
    for key, value in values.items():
        writer.add_uint32(f"{cfg.family}.{key}", value)
    for key, value in more.items():
        writer.add_uint16(key.replace("__", "."), value)
    writer.add_float32(f"{cfg.family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{cfg.family}.rope.freq_base", 1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<pad>", "<bos>", "<eos>", *ALPHABET[:-1].replace(" ", "Ġ"), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    names = zip(
        jax.tree.leaves(layout.layout(cfg, layout.HF_NAMES)),
        jax.tree.leaves(layout.layout(cfg, layout.GGUF_NAMES)),
        strict=True,
    )
    theirs = {
        a.name: b.name
        for hf, other in names
        for a, b in zip(hf.pieces, other.pieces, strict=True)
    }
    for name, tensor in convert.named_tensors(_params(cfg), cfg):
        writer.add_tensor(theirs[name], np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _drafter(root):
    for name, options in {
        "all": {},
        "some": {"draft_vocab_size": 5, "feature_layers": (1, 4)},
        "published": {"architecture": "eagle3", "feature_layers": (1, 3, 4)},
        "block": {"architecture": "block", "block_size": 3},
    }.items():
        cfg = drafter.of_target(TARGET, **options)
        params = _drawn(drafter.describe(cfg))
        if cfg.draft_vocab_size:
            params = params.replace(draft_ids=_DRAFT_IDS)
        params = params.replace(sharpness=np.float32(1.5), tau=np.float32(2.5))
        drafter_io.save(root / name, params, cfg, {"step": 3})


def _published(kind):
    def make(root):
        options = {"architecture": "eagle"}
        if kind != "eagle":
            layers = (1, 3, 4)
            options = {"architecture": "eagle3", "feature_layers": layers}
            options["draft_vocab_size"] = 5
        # A published layer is a Llama's.
        cfg = drafter.of_target(TARGET, **options)
        layer = _replace(cfg.layer, family="llama", qk_norm=False)
        cfg = _replace(cfg, layer=layer)
        params = _drawn(drafter.describe(cfg))
        if cfg.draft_vocab_size:
            params = params.replace(draft_ids=_DRAFT_IDS)
        head = np.ones((cfg.num_draft_tokens, TARGET.d_model), np.float32)
        drafter_hf.save(
            *(root / "one", params, cfg, kind, TARGET), head=head, dtype="float32"
        )

    return make


def _jsonl(root):
    (root / "rows").mkdir()
    rows = [*ROWS, {"prompt": list(MESSAGES), "answer": 3}]
    lines = [json.dumps(row) for row in rows]
    (root / "rows" / "data.jsonl").write_text("\n".join(lines) + "\n")


def _csv(root):
    (root / "rows").mkdir()
    lines = ['prompt,answer,id,"a, b"', *(f"{i}+1=,{i + 1},e{i}," for i in range(5))]
    lines.append('"2\n+""1""=",3,,x')
    (root / "rows" / "data.csv").write_text("\n".join(lines) + "\n")


def _parquet(root):
    (root / "rows").mkdir()
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, root / "rows" / "data.parquet")
    (root / "packed").mkdir()
    path = root / "packed" / "data.parquet"
    parquet.write_table(table, path, compression="zstd", row_group_size=2)


def _arrow(root):
    (root / "saved").mkdir()
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(root / "saved" / "data-0.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": "1"}
    (root / "saved" / "state.json").write_text(json.dumps(state))
    shutil.copytree(root / "saved", root / "splits" / "train")
    splits = json.dumps({"splits": ["train"]})
    (root / "splits" / "dataset_dict.json").write_text(splits)


def _records(root):
    run = root / "run"
    run.mkdir()
    rows = [
        {
            "step": step,
            "reward/mean": 0.25 * step,
            "reward/std": 0.5,
            "length/p50": 3.0,
            "length/p95": 5.0,
            "length/max": 6,
            "policy/entropy": "NaN" if step else 1.0,
            "time/step_s": 2.0,
            "time/rollout_s": 1.0,
            "time/compile_s": 0.5,
            "rollout/tokens": 40,
            "rollout/tokens_per_s": 40.0,
            "specdec/num_accepted": [10, 8, 2],
            "specdec/accept_length": 2.0,
            "specdec/strategy": "d2",
            "drafter/version": 1,
            "drafter/loss": 0.5,
            "drafter/top1_acc": [0.5, 0.25],
            "workers/idle_s": 4.0,
            "workers/trained_s": 3.0,
            "workers/idle_frac": 0.5,
            "mismatch/logprob_max_abs": 1e-6,
            "eval/pass@4": 0.5,
        }
        for step in range(3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / metrics.FILE).write_text(text)
    spans = [["busy", 0.0, 2.0], ["training", 2.0, 2.5], ["idle", 2.5, 3.0]]
    workers = [{"worker": 0, "intervals": spans}, {"worker": 1, "intervals": spans[:1]}]
    lines = [json.dumps({"step": s, "workers": workers}) for s in range(3)]
    (run / "timeline.jsonl").write_text("\n".join(lines) + "\n")
    model_tokenizer.from_alphabet(ALPHABET).save(run / "tokenizer")
    (run / "rollouts").mkdir()
    rows = [
        {
            "example_id": f"e{i}",
            "request_id": i,
            "reward": float(i % 2),
            "num_tokens": 3,
            "finish_reason": "eos",
            "prompt": list(MESSAGES) if i else "1+1=",
            "answer": "2",
            "text": "12a",
            "tokens": [4, 5, 17],
            "drafted": [[0, 1], [2, 3]],
        }
        for i in range(4)
    ]
    lines = [json.dumps(row) for row in rows]
    (run / "rollouts" / "step_000002.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "num_steps": 3,
        "seed": 0,
        "model": {"spec": "x"},
        "task": {"name": "chain_sum"},
        "algorithm": {"name": "grpo"},
        "specdec": {"mode": "tlt"},
        "workers": {"num": 2},
    }
    (run / "config.json").write_text(json.dumps(settings))


def _replace(cfg, **changes):
    return type(cfg)(**vars(cfg) | changes)


def _drawn(described):
    """Draw weights with NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)

    def draw(weight):
        return rng.normal(size=weight.shape).astype(np.float32)

    return jax.tree.map(draw, described)


def _params(cfg):
    return model_params.unstack(_drawn(model_params.describe(cfg)))


_MAKERS = {
    "config": _config,
    "tokenizer": _tokenizer,
    "template": _template,
    "safetensors": _weights,
    "index": _index,
    "gguf": _gguf,
    "drafter": _drafter,
    "eagle": _published("eagle"),
    "eagle3": _published("eagle3"),
    "speculators": _published("speculators"),
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "records": _records,
}
KINDS = tuple(_MAKERS)


def files(directory: str | os.PathLike) -> list[pathlib.Path]:
    """Every file of a variant, in order."""
    return sorted(p for p in pathlib.Path(directory).rglob("*") if p.is_file())
