"""Prompts in, text out: of a model, of a run, and with one line where it cannot be."""

import dataclasses
import functools
import io
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import command_lines
from tlt_jax import generate, policy, types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import hf as drafter_hf
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import convert, tokenizer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.specdec import sampling
from tlt_jax.workdir import checkpoint

ALPHABET = "abcdefghijklmnopqrstuvwxyz ?;:"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=40,
    num_layers=1,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
    max_positions=60,
    eos_ids=(2,),
)


def params_of(seed):
    rng = np.random.default_rng(seed)

    def draw(weight):
        return jnp.asarray(rng.normal(size=weight.shape) / weight.fan_in**0.5, "f")

    return jax.tree.map(draw, model_params.describe(CFG))


def tokenizer_of(chat_template):
    made = tokenizer.from_alphabet(ALPHABET)
    made.chat_template = chat_template
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer_of(TEMPLATE).save(directory / "source")
    convert.save(
        params_of(0),
        CFG,
        directory / "hf",
        tokenizer_source=directory / "source",
        dtype="float32",
    )
    return str(directory / "hf")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4; that of step 4 has `model`'s weights."""
    directory = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpointer(directory) as checkpointer:
        for step, seed in ((2, 9), (4, 0)):
            checkpointer.save(
                step, params_of(seed), {"count": jnp.int32(step)}, CFG, {}
            )
    tokenizer_of(TEMPLATE).save(directory / "tokenizer")
    (directory / "config.json").write_text('{"model": {"spec": "scratch"}}')
    return str(directory)


@pytest.fixture(scope="module")
def drafter_directory(tmp_path_factory):
    """A random drafter of `model`."""
    directory = tmp_path_factory.mktemp("trained")
    cfg = drafter.of_target(CFG, output_norm=False, max_length=50)
    params = drafter.init(cfg, jax.random.key(0))
    drafter_io.save(directory / "drafter", params, cfg)
    return str(directory)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random drafters of `model` as others compute them, one in another's layout."""
    directory = tmp_path_factory.mktemp("published")
    cfg = drafter.of_target(CFG, architecture="eagle")
    params = drafter.init(cfg, jax.random.key(0))
    drafter_hf.save(directory / "eagle", params, cfg, "eagle", CFG)
    # The one layer three times.
    cfg = drafter.of_target(
        CFG, architecture="eagle3", feature_layers=(0, 0, 0), draft_vocab_size=20
    )
    cfg = dataclasses.replace(cfg, own_head=True, norm_before_residual=True)
    ids = jnp.arange(20, dtype=jnp.int32) * 2
    params = drafter.init(cfg, jax.random.key(0)).replace(draft_ids=ids)
    drafter_io.save(directory / "eagle3", params, cfg)
    return directory


@pytest.fixture
def command():
    """Runs the command in this process; returns status, output and error output."""
    return functools.partial(command_lines.in_process, generate)


LAW = "--temperature=1"
SHORT = ("--prompt=say abc", "--max_new_tokens=12", "--seed=3", LAW)


def expected_text(prompt, seed=3, max_new_tokens=12, request_id=0, **law):
    """The text by the engine itself, from weights that never were in a file."""
    engine = engine_lib.Engine(
        CFG,
        engine_programs.EngineConfig(
            max_rows=1,
            max_length=512,
            sampling_cfg=sampling.SamplingConfig(**law),
            eos_ids=(2,),
        ),
    )
    engine.set_params(model_params.unstack(params_of(0)), 0)
    ids = tokenizer_of(None).encode(prompt)
    requests = [types.Request(request_id, 0, 0, ids, max_new_tokens)]
    (completion,), _ = engine.run(requests, seed)
    return tokenizer_of(None).decode(completion.tokens) + "\n"


CHAT = "user:say abc;assistant:"


def test_the_text_alone_goes_to_standard_output(command, model):
    status, out, error = command(f"--model={model}", *SHORT)
    assert status == 0
    assert out == expected_text(CHAT)
    assert len(out) > 5
    assert "tokens, ended by " in error
    for word in ("prefill 22 tokens in", "decode ", "compile ", "accept length 1.00"):
        assert word in error
    assert model in error and "float32" in error


def test_a_run_answers_with_its_newest_checkpoint(command, model, workdir):
    status, out, error = command(f"--model={workdir}", *SHORT)
    assert (status, out) == (0, expected_text(CHAT))
    assert f"{workdir}, step 4, float32" in error


def test_settings_reach_the_engine(command, model):
    status, out, _ = command(f"--model={model}", *SHORT, "--raw")
    assert (status, out) == (0, expected_text("say abc"))
    law = dict(temperature=0.6, top_k=9, top_p=0.8, min_p=0.05)
    options = [f"--{name}={value}" for name, value in law.items()]
    status, out, _ = command(f"--model={model}", *SHORT, "--system=be kind", *options)
    system = "system:be kind;" + CHAT
    assert (status, out) == (0, expected_text(system, **law))


def test_without_a_law_the_models_own_is_taken(command, model, workdir, tmp_path):
    arguments = [argument for argument in SHORT if argument != LAW]
    status, out, error = command(f"--model={model}", *arguments)
    assert (status, out) == (0, expected_text(CHAT, temperature=0.7))
    assert "temperature 0.7 (by default)" in error
    # What a model's files say, and what a run was trained with.
    own = tmp_path / "own"
    shutil.copytree(model, own)
    path = own / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.4, "top_k": 9, "eos_token_id": 2}))
    _, out, error = command(f"--model={own}", *arguments)
    assert out == expected_text(CHAT, temperature=0.4, top_k=9)
    assert "temperature 0.4 (the model's own), top_k 9" in error
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    settings = {"sampling": {"temperature": 1.3}, "precision": "float32"}
    (run / "config.json").write_text(json.dumps(settings))
    _, out, error = command(f"--model={run}", *arguments)
    assert out == expected_text(CHAT, temperature=1.3)
    assert "step 4, float32, temperature 1.3 (the run's)" in error


def test_without_a_length_the_context_is_the_limit(command, model):
    status, out, error = command(f"--model={model}", SHORT[0], "--seed=3", LAW)
    assert (status, out) == (0, expected_text(CHAT, max_new_tokens=37)), error
    prompts = [np.zeros(n, np.int32) for n in (22, 800, 999, 1000)]
    asked = generate.requests_of(prompts, 1, None, limit=1000)
    assert [request.max_new_tokens for request in asked] == [256, 200, 1, 1]
    # What is asked for is never lowered: the engine says that it does not fit.
    (asked,) = generate.requests_of(prompts[3:], 1, 7, limit=1000)
    assert asked.max_new_tokens == 7


def test_an_earlier_checkpoint_answers(command, model, workdir):
    status, out, error = command(f"--model={workdir}", "--step=2", *SHORT)
    assert status == 0 and f"{workdir}, step 2, float32" in error
    assert out != expected_text(CHAT)
    status, _, error = command(f"--model={workdir}", "--step=3", *SHORT)
    assert status == 2 and "step=3 has no checkpoint" in error and "2, 4" in error
    status, _, error = command(f"--model={model}", "--step=3", *SHORT)
    assert status == 2 and "step=3 is for the workdir of a run" in error


def test_every_prompt_is_answered(command, model, tmp_path):
    several = ("--prompt=say abc", "--prompt=and", f"--model={model}", *SHORT[1:])
    texts = [expected_text(CHAT), expected_text("user:and;assistant:", request_id=1)]
    status, out, _ = command(*several)
    lines = out.splitlines(keepends=True)
    assert status == 0 and lines[1::2] == texts
    assert lines[0].startswith("[1] ") and lines[2].startswith("[2] ")
    _, out, _ = command(*several, "--num_samples=2")
    starts = [line.split()[0] for line in out.splitlines()[::2]]
    assert starts == ["[1.1]", "[1.2]", "[2.1]", "[2.2]"]
    # From a file, into a file.
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("say abc\n\nand\n")
    rest = (f"--model={model}", f"--prompts_file={path}", f"--out={out}", *SHORT[1:])
    status, shown, error = command(*rest)
    assert (status, shown) == (0, "")
    assert f"wrote 2 completions to {out}" in error
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] + "\n" for row in rows] == texts
    assert [row["prompt"] for row in rows] == ["say abc", "and"]
    assert rows[0].keys() == set(
        "id prompt sample text num_tokens finish_reason".split()
    )
    # It is not overwritten.
    status, _, error = command(*rest)
    assert status == 2 and "is there already" in error


def test_prompts_are_rows_of_a_data_set(command, model, tmp_path):
    prompts = ["say abc", [{"role": "user", "content": "say abc"}]]
    for key, prompt in zip(("prompt", "messages"), prompts, strict=True):
        path, out = tmp_path / f"{key}.jsonl", tmp_path / f"{key}_out.jsonl"
        path.write_text(json.dumps({"id": "first", key: prompt}) + "\n")
        arguments = (f"--prompts_file={path}", f"--out={out}", *SHORT[1:])
        status, _, error = command(f"--model={model}", *arguments)
        assert status == 0, error
        (row,) = map(json.loads, out.read_text().splitlines())
        assert row["text"] + "\n" == expected_text(CHAT)
        assert (row["id"], row["prompt"], row["sample"]) == ("first", prompt, 0)


def test_a_streamed_text_is_the_text(command, model):
    status, out, error = command(f"--model={model}", *SHORT, "--stream")
    assert (status, out) == (0, expected_text(CHAT))
    assert "[1] " in error and "tokens, ended by " in error


def test_options_reach_the_chat_template(command, model, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    template = TEMPLATE + "{% if thinking %}think;{% endif %}"
    (own / "chat_template.jinja").write_text(template)
    option = "--template_option=thinking=True"
    status, out, _ = command(f"--model={own}", *SHORT, option)
    assert (status, out) == (0, expected_text(CHAT + "think;"))
    assert command(f"--model={own}", *SHORT)[1] == expected_text(CHAT)


def test_a_conversation_keeps_what_was_said(command, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd\n" + 40 * "e" + "\n/exit\n"))
    chat = (f"--model={model}", "--chat", "--max_new_tokens=4", "--seed=3", LAW)
    status, out, error = command(*chat)
    assert status == 0 and "/exit" in error
    first = expected_text("user:ab;assistant:", max_new_tokens=4)
    text = f"user:ab;assistant:{first[:-1]};user:cd;assistant:"
    second = expected_text(text, max_new_tokens=4, request_id=1)
    third = out.removeprefix(first + second)
    assert out.startswith(first + second) and "/clear begins anew.]" in third


def test_samples_share_the_prompt_and_differ(command, model):
    status, out, error = command(f"--model={model}", *SHORT, "--num_samples=2")
    assert status == 0
    texts = [expected_text(CHAT, request_id=i) for i in range(2)]
    assert texts[0] != texts[1]
    lines = out.splitlines(keepends=True)
    assert [lines[1], lines[3]] == texts
    assert lines[0].startswith("[1] ") and lines[2].startswith("[2] ")
    assert "prefill 22 tokens" in error and "for 2 rows" in error


def test_a_stop_string_ends_the_text(command, model):
    text = expected_text(CHAT).removesuffix("\n")
    stop = text[4]
    status, out, error = command(f"--model={model}", *SHORT, f"--stop={stop}")
    assert out == text[: text.index(stop) + 1] + "\n"
    assert "ended by stop" in error


def test_prompts_come_from_files_and_standard_input(
    command, model, tmp_path, monkeypatch
):
    path = tmp_path / "prompt.txt"
    path.write_text("say abc\n")
    rest = (f"--model={model}", *SHORT[1:])
    assert command(f"--prompt_file={path}", *rest)[:2] == (0, expected_text(CHAT))
    monkeypatch.setattr("sys.stdin", io.StringIO("say abc"))
    assert command("--prompt=-", *rest)[:2] == (0, expected_text(CHAT))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--prompt=a"], "--model=SPEC is missing"),
        (["--model=M"], "give either --prompt=TEXT"),
        (["--model=M", "--prompt=a", "--prompt_file=b"], "give either --prompt=TEXT"),
        (["--model=M", "--prompt="], "the prompt is empty"),
        (["--model=M", "--prompt_file=absent.txt"], "absent.txt cannot be read"),
        (["--model=M", "--prompt=A"], "cannot encode"),
        (["--model=M", "--prompt=a", "--compare"], "name a drafter with --drafter"),
        (["--model=M", "--prompt=a", "--rule=block"], "name a drafter with --drafter"),
        (["--model=M", "--prompt=a", "--rule=greedy"], "keyed|rejection|block"),
        (
            ["--model=M", "--prompt=a", "--top_p=2"],
            r"top_p=2.0 is out of range: at least 1e-09, at most 1",
        ),
        (["--model=M", "--prompt=a", "--num_samples=0"], "--num_samples=0"),
        (["--model=M", "--prompt=a", "--sed=0"], "Did you mean: seed"),
        (["--model=M", "--prompt=a", "b"], "did you quote the prompt?"),
        (["--model=no such", "--prompt=a"], "names no model"),
        (["--model=EMPTY", "--prompt=a"], "holds no complete checkpoint"),
        (["--model=NOTHING", "--prompt=a"], "without a model (config.json and"),
        (["--model=M", "--prompt=a", "--chat"], "give either --prompt=TEXT"),
        (["--model=M", "--chat", "--num_samples=2"], "--num_samples has no place in"),
        (["--model=M", "--chat", "--out=o.jsonl"], "--out has no place in"),
        (["--model=M", "--prompts_file=absent.jsonl"], "absent.jsonl is not a file"),
        (["--model=M", "--prompts_file=absent.txt"], "absent.txt cannot be read"),
        (["--model=M", "--prompts_file=a.doc"], "has the suffix '.doc'"),
        (["--model=M", "--prompt=a", "--prompt=b", "--stream"], "--stream shows one"),
        (["--model=M", "--prompt=a", "--out=absent/o.jsonl"], "lies in no directory"),
        (["--model=M", "--prompt=a", "--template_option=b"], "not of the form KEY=VAL"),
        (["--model=M", "--prompt=a", "--temperature=hot"], "--temperature=hot"),
        (
            ["--model=M", "--prompt=a", "--raw", "--system=b"],
            "needs a chat template, --raw leaves out one: drop --raw",
        ),
        (
            ["--model=M", "--prompt=a", "--raw", "--max_new_tokens=60"],
            "lower --max_new_tokens to 59 or less",
        ),
        (["--model=M", "--prompt=" + 60 * "a"], "fills the model's context of 60"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    command, model, tmp_path, arguments, message
):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "nothing").mkdir()
    places = {"--model=M": f"--model={model}", "--model=EMPTY": f"--model={tmp_path}"}
    places["--model=NOTHING"] = f"--model={tmp_path}/nothing"
    status, out, error = command(*(places.get(a, a) for a in arguments))
    assert status == 2
    assert out == ""
    # Before it there may be stages, a line each.
    *stages, last = error.splitlines()
    assert last.startswith("error: ") and message in last
    assert all(stage.endswith(" ...") for stage in stages)


def test_a_tokenizer_without_a_template_continues_the_text():
    plain = tokenizer_of(None)
    assert plain.decode(generate.encode(plain, "ab")) == "ab"
    with pytest.raises(ValueError, match="this model has none: put the text into"):
        generate.encode(plain, "ab", system="c")
    chat = tokenizer_of(TEMPLATE)
    assert chat.decode(generate.encode(chat, "ab")) == "user:ab;assistant:"
    assert chat.decode(generate.encode(chat, "ab", raw=True)) == "ab"


@pytest.mark.parametrize("place", ["model", "workdir"])
def test_precision_is_that_of_weights_and_engine(place, request):
    asked = policy.load(request.getfixturevalue(place), "bfloat16")
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(asked.params)}
    assert dtypes == {"bfloat16"}
    assert isinstance(asked.params.layers, tuple)
    engine = asked.engine(max_rows=3, max_length=20, page_size=4)
    assert engine.engine_cfg == engine_programs.EngineConfig(
        max_rows=3, max_length=20, page_size=4, eos_ids=(2,), dtype="bfloat16"
    )


def test_the_command_runs_as_a_module(model):
    done = subprocess.run(
        [sys.executable, "-m", "tlt_jax.generate", f"--model={model}", *SHORT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_text(CHAT)
    assert "\n[1] " in done.stderr and done.stderr.startswith("loading ")


@pytest.mark.parametrize("kind", ["learned", "eagle", "eagle3", "ngram"])
def test_speculation_gives_the_same_text(
    command, model, drafter_directory, published, kind
):
    _, plain, _ = command(f"--model={model}", *SHORT, "--num_samples=2")
    named = {"learned": drafter_directory, "ngram": "ngram"}
    where = named.get(kind, published / kind)
    used = {"ngram": "D5K1V6-ngram", "eagle": "D1K1V2"}.get(kind, "D2K2V4")
    status, text, errors = command(
        f"--model={model}",
        *SHORT,
        "--num_samples=2",
        f"--drafter={where}",
        "--compare",
        *((f"--strategy=4:{used}",) if kind != "ngram" else ()),
    )
    assert status == 0, errors
    assert text == plain
    assert "tokens equal in 2 of 2" in errors and "times as fast" in errors
    assert "accepted by depth:" in errors
    assert f"calls by strategy: {used}" in errors


def test_a_chain_rule_draws_other_tokens_and_says_so(command, model, drafter_directory):
    arguments = (f"--model={model}", *SHORT, f"--drafter={drafter_directory}")
    several = ("--num_samples=4", "--strategy=4:D3K2V7", "--rule=rejection")
    status, text, errors = command(*arguments, *several, "--compare")
    assert status == 0, errors
    assert "(rule rejection draws others from the same law)" in errors
    _, plain, _ = command(*arguments[:-1], "--num_samples=4")
    assert text != plain
    assert command(*arguments, *several)[1] == text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["--drafter=absent"],
            "'absent' is neither a directory here nor one that comes",
        ),
        (["--drafter=ngram", "--strategy=D2K2V4"], "is not <largest number of rows>"),
        (["--drafter=ngram", "--strategy=1:D2K2V9"], "exceeds the tree's 7 nodes"),
        (["--drafter=ngram", "--strategy=1:D2K2V4"], "asks the learned drafter"),
        (["--drafter=ngram", "--rule=block"], "judges whole chains"),
    ],
    ids="absent entry nodes ngram rule".split(),
)
def test_what_cannot_speculate_is_refused(command, model, arguments, message):
    status, _, errors = command(f"--model={model}", *SHORT, *arguments)
    assert status == 2 and message in errors


def test_a_longer_text_than_the_drafter_was_trained_for(
    command, model, drafter_directory
):
    status, _, errors = command(
        f"--model={model}",
        "--prompt=say abc",
        "--max_new_tokens=36",
        f"--drafter={drafter_directory}",
    )
    assert status == 2 and "was trained for 50" in errors
