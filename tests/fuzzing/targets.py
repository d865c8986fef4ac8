"""What reads a file of each kind, and what it may never return: nonsense."""

import itertools
import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping

import gguf
import jax
import numpy as np

from tests.fuzzing import seeds
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import convert, gguf_file, hf_config
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.tasks import examples
from tlt_jax.viz import page, plots, report, timeline
from tlt_jax.workdir import metrics

_MOST_PARAMETERS = 10**13


class Nonsense(AssertionError):
    """A reader accepted what means nothing."""


def _is(condition, what) -> None:
    if not condition:
        raise Nonsense(what)


def config(directory: pathlib.Path) -> None:
    _check_config(hf_config.read(directory))
    _check_json(directory / "config.json")


def _check_json(path: pathlib.Path) -> None:
    """Refuse an object that says a key twice."""

    def unique(pairs):
        names = [name for name, _ in pairs]
        _is(len(names) == len(set(names)), f"{path.name} repeats a key of {names}")
        return dict(pairs)

    if path.exists():
        json.loads(path.read_text("utf-8"), object_pairs_hook=unique)


def _check_config(cfg) -> None:
    sizes = (
        "vocab_size num_layers d_model d_ff num_heads num_kv_heads head_dim"
    ).split()
    for name in (*sizes, "max_positions"):
        size = getattr(cfg, name)
        _is(type(size) is int and 0 < size < 2**31, f"{name}={size!r}")
    for name in ("rms_norm_eps", "rope_theta"):
        value = getattr(cfg, name)
        _is(type(value) is float and 0 < value < math.inf, f"{name}={value!r}")
    _is(cfg.rms_norm_eps < 1, f"rms_norm_eps={cfg.rms_norm_eps}")
    _is(model_params.count(cfg) < _MOST_PARAMETERS, f"{model_params.count(cfg)}")
    special = [i for i in (cfg.bos_id, cfg.pad_id, *cfg.eos_ids) if i is not None]
    inside = all(type(i) is int and 0 <= i < cfg.vocab_size for i in special)
    _is(inside, f"special tokens {special}")
    for name, value in vars(cfg.rope_scaling or object).items():
        if isinstance(value, float) and not name.startswith("_"):
            _is(0 < value < math.inf, f"rope_scaling.{name}={value}")
    hash(cfg)


def tokenizer(directory: pathlib.Path) -> None:
    made = model_tokenizer.from_directory(directory)
    _is(0 < made.vocab_size < 2**31, f"vocab_size={made.vocab_size}")
    for i in (made.bos_id, made.pad_id, *made.eos_ids):
        _is(i is None or 0 <= i < made.vocab_size, f"special token {i}")
    _is(made.encode("ab 12").dtype == np.int32, "ids")
    ids = [0, 1, 5, made.vocab_size - 1, made.vocab_size + 1]
    _is(isinstance(made.decode(ids), str), "text")
    for i in ids:
        made.token_bytes(i)
    if made.chat_template is not None:
        made.encode_prompt(seeds.MESSAGES)


def template(directory: pathlib.Path) -> None:
    made = model_tokenizer.from_directory(directory)
    text = made.render(seeds.MESSAGES)
    _is(len(text) < 10**7, f"{len(text)} characters")


def weights(directory: pathlib.Path) -> None:
    cfg = hf_config.read(directory)
    params = convert.load(directory, cfg)
    _check_params(params, model_params.describe(cfg))
    for path in directory.glob("*.safetensors"):
        _check_safetensors(path)


def _check_params(params, described) -> None:
    wanted = [leaf.shape for leaf in jax.tree.leaves(described)]
    leaves = jax.tree.leaves(params)
    _is([leaf.shape for leaf in leaves] == wanted, "shapes")
    _is(all(np.isfinite(np.asarray(x)).all() for x in leaves), "not finite weights")


def _check_safetensors(path: pathlib.Path) -> None:
    """The format's own rules, written down apart from any reader."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])

    def unique(pairs):
        _is(len({key for key, _ in pairs}) == len(pairs), f"{path.name}: a key twice")
        return dict(pairs)

    header = json.loads(content[8 : 8 + length], object_pairs_hook=unique)
    header.pop("__metadata__", None)
    places = sorted(entry["data_offsets"] for entry in header.values())
    ends = [0, *(end for _, end in places)]
    starts = [*(start for start, _ in places), len(content) - 8 - length]
    _is(starts == ends, f"{path.name}: tensors do not tile the file")
    shapes = (entry["shape"] for entry in header.values())
    sizes = itertools.chain.from_iterable(shapes)
    _is(all(type(n) is int and n >= 0 for n in sizes), "sizes")


def gguf_model(directory: pathlib.Path) -> None:
    file = gguf_file.GGUFFile(directory / "model.gguf")
    _check_config(file.config)
    _check_params(file.load(), model_params.describe(file.config))
    made = file.tokenizer()
    _is(made.vocab_size <= file.config.vocab_size, "more tokens than embeddings")
    made.encode("ab 12")
    made.encode_prompt(seeds.MESSAGES)
    for i in (made.bos_id, made.pad_id, *made.eos_ids):
        _is(i is None or 0 <= i < made.vocab_size, f"special token {i}")
    tensors = gguf.GGUFReader(directory / "model.gguf").tensors
    places = sorted((t.data_offset, t.data_offset + t.n_bytes) for t in tensors)
    apart = all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    _is(apart, "tensors overlap")


def any_drafter(directory: pathlib.Path) -> None:
    cfg, params = drafter_io.load(directory, seeds.TARGET)
    _check_config(cfg.layer)
    _is(cfg.layer.d_model == seeds.TARGET.d_model, "width")
    _is(type(cfg.draft_vocab_size) is int and type(cfg.max_length) is int, "sizes")
    layers = cfg.feature_layers
    inside = all(type(i) is int and 0 <= i < seeds.TARGET.num_layers for i in layers)
    _is(inside, f"feature_layers={layers}")
    flags = (cfg.output_norm, cfg.join_bias, cfg.norm_before_residual, cfg.own_head)
    _is(all(type(flag) is bool for flag in flags), f"flags {flags}")
    if cfg.draft_vocab_size:
        ids = np.asarray(params.draft_ids)
        rising = ids.dtype == np.int32 and (np.diff(ids) > 0).all() and ids[0] >= 0
        _is(rising and ids[-1] < seeds.TARGET.vocab_size, f"draft_ids {ids}")
    plain = params.replace(draft_ids=None, sharpness=None, tau=None)
    _check_params(plain, drafter.describe(cfg))
    drafter_io.read_config(directory, seeds.TARGET)
    for path in directory.glob("*.safetensors"):
        _check_safetensors(path)
    _check_json(directory / "config.json")


def rows(name: str) -> Callable[[pathlib.Path], None]:
    def read(directory: pathlib.Path) -> None:
        path = directory / name
        for found in examples.scan(path):
            if found.example is None:
                _is(found.problem and "\n" not in found.problem, found.problem)
                _is(len(found.problem) < 1000, "a long problem")
                continue
            one = found.example
            _is(isinstance(one.example_id, str) and one.prompt, "an empty prompt")
            json.dumps([one.prompt, one.answer], ensure_ascii=False).encode()
        examples.read_examples(path, on_bad="skip")

    return read


def records(directory: pathlib.Path) -> None:
    read = metrics.read(directory)
    steps = [row["step"] for row in read]
    _is(all(type(step) is int and step >= 0 for step in steps), f"steps {steps}")
    _is(steps == sorted(set(steps)), f"steps {steps} do not rise")
    spans = timeline.read(directory)
    for record in spans:
        spent = timeline.seconds(record).values()
        _is(all(0 <= s < math.inf for s in spent), f"seconds {spent}")
    if not read:
        return
    report.summary(read)
    _, answers, _ = report.sample_answers(directory, 3)
    for answer in answers:
        _is(math.isfinite(answer.reward), f"reward {answer.reward}")
        page.answer(answer).encode()
    # Pictures take long: where the content says so.
    if sum((directory / metrics.FILE).read_bytes()) % 16 == 0:
        plots.figures(directory)
        report.page(directory, 3).encode()


READERS: Mapping[str, Callable[[pathlib.Path], None]] = {
    "config": config,
    "tokenizer": tokenizer,
    "template": template,
    "safetensors": weights,
    "index": weights,
    "gguf": gguf_model,
    "drafter": any_drafter,
    "eagle": any_drafter,
    "eagle3": any_drafter,
    "speculators": any_drafter,
    "jsonl": rows("data.jsonl"),
    "csv": rows("data.csv"),
    "parquet": rows("data.parquet"),
    "arrow": rows(""),
    "records": records,
}
