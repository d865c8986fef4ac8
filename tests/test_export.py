"""From a run's workdir to a directory that `transformers` loads."""

import os
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A workdir; what checkpoints hold is put there by the tests."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        model_params.abstract(CFG),
    )

    def restore_policy(workdir, step=None):
        assert workdir == str(tmp_path / "run")
        if step not in (None, 3, 7):
            raise checkpoint.CheckpointError(f"step={step} has no checkpoint: 3, 7.")
        return params, CFG, step or 7

    monkeypatch.setattr(checkpoint, "restore_policy", restore_policy)
    tokenizer.from_alphabet("0123456789+=").save(tmp_path / "run" / "tokenizer")
    return str(tmp_path / "run"), params


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_the_policy_and_its_tokenizer(run, tmp_path, dtype):
    workdir, params = run
    out = str(tmp_path / "out")
    assert export.export(workdir, out, step=3, dtype=dtype) == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(
        model.model.embed_tokens.weight.detach().float().numpy(),
        params.embed.astype(dtype).astype(jnp.float32),
    )
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("1+2=")["input_ids"] == [4, 13, 5, 14]
    assert model.generation_config.eos_token_id == 2


def test_what_is_wrong_is_said_and_nothing_is_written(run, tmp_path):
    workdir, _ = run
    with pytest.raises(checkpoint.CheckpointError, match="step=5"):
        export.export(workdir, str(tmp_path / "out"), step=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export.export(workdir, str(tmp_path / "full"))
    os.remove(tmp_path / "run" / "tokenizer" / "tokenizer.json")
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        export.export(workdir, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["full", "run"]


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
