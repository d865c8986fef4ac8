"""What docs/extending.md shows runs as it stands there."""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.specdec.training import losses
from tlt_jax.workdir import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the page's files, as its reader would make them."""
    made = tmp_path_factory.mktemp("extending")
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        path = made / code.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return made


def test_an_example_is_short(folder):
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < 35, f"{path}: {node.name}"


def test_the_page_s_commands_use_all_of_them(folder, tmp_path):
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    more = ("--config.log.progress=off", "--config.log.tensorboard=false")
    # A model that has learnt less says more of what is nearly right.
    more += ("--config.pretrain.steps=60",)
    # Each strategy is compiled for each size of batch: there is one.
    more += ("--config.rollout.max_batch=1",)
    block = block.replace("workdirs", str(tmp_path))
    # From where the reader's own files lie: nothing but that names them.
    for line in block.replace("=configs/", f"={ROOT}/configs/").splitlines():
        python, *words = shlex.split(line)
        assert python == "python" and words[:2] == ["-m", "tlt_jax.main"]
        done = subprocess.run(
            [sys.executable, *words, *more],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
    (row,) = metrics.read(tmp_path / "mine")
    # The tuner took turns between the proposer of one's own and the other one.
    assert row["specdec/strategy"] in ("D3K1V4-mine.proposers:Rising", "D2K1V3-ngram")
    assert row["specdec/num_accepted"][0] > 0
    # The surrogate of one's own clips nothing.
    assert row["policy/clip_frac"] == 0 and row["policy/grad_norm"] > 0
    (path,) = (tmp_path / "mine_paid").glob("rollouts/*.jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    told = [line["rewards"] for line in lines]
    # What is close is paid, if less than what is right.
    assert {one["close"] for one in told} - {0.0, 1.0}
    assert [line["reward"] for line in lines] == pytest.approx(
        [one["task"] + 0.5 * one["close"] for one in told]
    )
    (row,) = metrics.read(tmp_path / "mine_paid")
    for name in ("task", "close"):
        mean = sum(one[name] for one in told) / len(told)
        assert row[f"reward/{name}"] == pytest.approx(mean)


def test_the_drafter_s_loss_of_ones_own(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    target = jnp.array([[2.0, 0.0]])
    found = losses.token_loss("mine.losses:tempered", target, jnp.zeros((1, 2)))
    np.testing.assert_allclose(found, [np.log(2)], rtol=1e-6)
    with pytest.raises(ValueError, match="there is no module 'nobodys'"):
        losses.token_loss("nobodys.losses:tempered", target, target)
