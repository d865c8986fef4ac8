"""From a run's workdir to a directory that `transformers` loads."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tlt_jax import assembly, export, policy, types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import tokenizer
from tlt_jax.runtime import train_state
from tlt_jax.specdec import sampling
from tlt_jax.workdir import checkpoint, drafter_checkpoint

CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=16,
    num_layers=2,
    d_model=8,
    d_ff=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=True,
    eos_ids=(2,),
)


def random_params(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        model_params.abstract(CFG),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with checkpoints of steps 3 and 7, whose policies differ."""
    directory = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpointer(directory) as checkpointer:
        for step in (3, 7):
            checkpointer.save(step, random_params(step), {"count": step}, CFG, {})
    tokenizer.from_alphabet("0123456789+=").save(directory / "tokenizer")
    (directory / "config.json").write_text('{"model": {"spec": "org/name"}}')
    return directory


@pytest.mark.parametrize("dtype,step", [("bfloat16", 3), ("float32", None)])
def test_transformers_loads_the_policy_and_its_tokenizer(
    workdir, tmp_path, dtype, step
):
    out = str(tmp_path / "out")
    written = export.export(str(workdir), out, step=step, dtype=dtype)
    assert written == (step or 7)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(
        model.model.embed_tokens.weight.detach().float().numpy(),
        random_params(written).embed.astype(dtype).astype(jnp.float32),
    )
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("1+2=")["input_ids"] == [4, 13, 5, 14]
    assert model.generation_config.eos_token_id == 2


def test_both_eos_of_model_and_tokenizer_are_written(tmp_path):
    """Rollouts end at both, so whoever loads the policy must know both."""
    cfg = dataclasses.replace(CFG, eos_ids=(0,))
    with checkpoint.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, random_params(1), {"count": 1}, cfg, {})
    own = tokenizer.from_alphabet("0123456789+=")
    own.save(tmp_path / "run" / "tokenizer")
    assert assembly.eos_ids_of(cfg, own) == (0, 2)
    # A token that the model does not have ends nothing.
    small = dataclasses.replace(cfg, vocab_size=2)
    assert assembly.eos_ids_of(small, own) == (0,)
    export.export(str(tmp_path / "run"), str(tmp_path / "out"))
    for name in ("generation_config.json", "config.json"):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert written["eos_token_id"] == [0, 2]


# The text of the first ends with EOS, that of the second by its length.
PROMPTS = ("31", "6+")


def test_greedy_text_is_that_of_transformers_however_it_is_generated(workdir, tmp_path):
    """Plainly, with an assistant, and with guesses looked up in the prompt."""
    out = str(tmp_path / "out")
    export.export(str(workdir), out, dtype="float32")
    asked = policy.load(str(workdir))
    prompts = [asked.tokenizer.encode(prompt) for prompt in PROMPTS]
    engine = asked.engine(
        max_rows=2,
        max_length=64,
        steps_per_call=8,
        sampling_cfg=sampling.SamplingConfig(temperature=0.0),
    )
    requests = [types.Request(i, i, 0, ids, 24) for i, ids in enumerate(prompts)]
    completions, _ = engine.run(requests, 0)
    engine.pool.close()
    texts = [c.tokens.tolist() for c in sorted(completions, key=lambda c: c.request_id)]
    assert 10 < len(texts[0]) < 24 and len(texts[1]) == 24
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    encode = transformers.AutoTokenizer.from_pretrained(out)
    export.export(str(workdir), str(tmp_path / "other"), step=3, dtype="float32")
    assistant = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    for options in (
        {},
        {"assistant_model": model},
        {"assistant_model": assistant},
        {"prompt_lookup_num_tokens": 3},
    ):
        for prompt, ids, wanted in zip(PROMPTS, prompts, texts, strict=True):
            inputs = encode(prompt, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == ids.tolist()
            text = model.generate(
                **inputs, max_new_tokens=24, do_sample=False, **options
            )
            assert text[0, len(ids) :].tolist() == wanted, options


EAGLE = drafter.of_target(CFG, architecture="eagle", max_length=40)


def random_drafter(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape), "float32"),
        drafter.describe(cfg),
    )


def test_the_drafter_of_a_run_is_given_out(workdir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    with pytest.raises(ValueError, match="holds no drafter: give the --workdir of"):
        export.export_drafter(str(run), str(tmp_path / "out"), "eagle")
    weights = {step: random_drafter(EAGLE, step) for step in (3, 7)}
    with drafter_checkpoint.DrafterCheckpointer(run) as checkpointer:
        for step, params in weights.items():
            snapshot = train_state.Snapshot(
                train_state.TrainState(params, {"m": params}, jnp.int32(9)),
                {"buffer.tokens": np.arange(5)},
                {"version": 2, "sharpness": 1.5, "tau": 2.5},
            )
            checkpointer.save(step, snapshot, EAGLE)
    for layout, step in (("eagle", None), ("eagle", 3), ("tlt", None)):
        out = str(tmp_path / f"{layout}{step}")
        said = export.export_drafter(str(run), out, layout, step, dtype="float32")
        assert said == f"the drafter of step {step or 7}"
        cfg, params = drafter_io.load(out, CFG)
        assert (cfg.architecture, cfg.max_length) == ("eagle", 40)
        # Engines of others have no place for them.
        measured = (1.5, 2.5) if layout == "tlt" else (None, None)
        assert (params.sharpness, params.tau) == measured
        jax.tree.map(
            np.testing.assert_array_equal,
            params.replace(join_bias=None, sharpness=None, tau=None),
            weights[step or 7],
        )
    with pytest.raises(ValueError, match="use the layout eagle"):
        export.export_drafter(str(run), str(tmp_path / "no"), "speculators")
    with pytest.raises(checkpoint.CheckpointError, match="step=5 has no checkpoint"):
        export.export_drafter(str(run), str(tmp_path / "no"), "eagle", 5)


def test_the_drafter_of_an_offline_training_is_given_out(workdir, tmp_path):
    export.export(str(workdir), str(tmp_path / "run" / "target"), dtype="float32")
    three = drafter.of_target(CFG, architecture="eagle")
    params = random_drafter(three)
    drafter_io.save(tmp_path / "run" / "drafter", params, three, {"num_steps": 12})
    out = str(tmp_path / "out")
    said = export.export_drafter(str(tmp_path / "run"), out, "eagle", dtype="float32")
    assert said == "the drafter trained for 12 steps"
    _, read = drafter_io.load(out, CFG)
    jax.tree.map(np.testing.assert_array_equal, read.replace(join_bias=None), params)
    ours = drafter.of_target(CFG)
    drafter_io.save(tmp_path / "run" / "drafter", random_drafter(ours), ours)
    with pytest.raises(
        ValueError, match="train one with drafter.architecture='eagle3'"
    ):
        export.export_drafter(str(tmp_path / "run"), str(tmp_path / "no"), "eagle3")


def test_what_is_wrong_is_said_and_nothing_is_written(workdir, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="step=5"):
        export.export(str(workdir), str(tmp_path / "out"), step=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export.export(str(workdir), str(tmp_path / "full"))
    shutil.copytree(workdir / "checkpoints", tmp_path / "bare" / "checkpoints")
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        export.export(str(tmp_path / "bare"), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["bare", "full"]


def test_the_command_explains_itself_and_its_failures(tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "tlt_jax.export", *arguments],
            capture_output=True,
            text=True,
        )

    shown = command("--help")
    assert "--workdir" in shown.stdout and "--dtype" in shown.stdout
    assert "Write a run's policy, or its drafter, for other programs" in shown.stdout
    failed = command(f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}")
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: ") and "holds no checkpoints" in line
