"""From a run's workdir to a directory that `transformers` loads."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tlt_jax import checkpoint, export
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models import tokenizer

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
    assert "Write a run's policy as a Hugging Face directory" in shown.stdout
    failed = command(f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}")
    assert failed.returncode == 1
    assert "holds no checkpoints" in failed.stderr
    assert "Traceback" not in failed.stderr
