"""The large recipes are valid, are the paper's, and refuse other models by name."""

import pytest

from configs import grpo
from tests import command_lines
from tlt_jax import config
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.update import algorithms

DEVICES = {
    "64xh200": (64,),
    "8xh200": (8,),
    "8xh100": (8,),
    "h200": (1,),
    "v5p-8": (4,),
    "v5e-8": (8,),
}


@pytest.mark.parametrize("name", grpo.VARIANTS)
def test_every_variant_has_the_papers_settings(name):
    run = config.load(grpo.get_config(name))
    assert run.model.spec.count("/") == 1
    assert run.rollout.group_size == 8
    assert run.task.max_prompt_tokens + run.rollout.max_new_tokens == 32 * 1024
    assert run.learner.row_tokens == 32 * 1024
    assert (run.sampling.temperature, run.sampling.top_p) == (0.9, 1.0)
    assert run.optimizer.learning_rate == 1e-6
    assert run.precision == "bfloat16"
    algorithm = algorithms.build(
        algorithms.preset(run.algorithm.name) | run.algorithm.overrides()
    )
    loss = algorithm.loss
    assert (loss.clip_low, loss.clip_high) == (0.2, 0.2)
    assert (loss.kl_coef, loss.kl_estimator) == (0.001, "k3")
    assert loss.kl_placement == "loss"
    assert algorithm.advantage == "grpo"
    # Rows of a micro-batch and heads divide over the mesh's parts.
    num_devices = run.mesh.fsdp * run.mesh.expert * run.mesh.tensor
    assert num_devices in (DEVICES.get(name.partition("@")[2], (64, 256)))


def test_the_default_is_the_first_variant():
    assert grpo.get_config() == grpo.get_config("qwen2.5-7b")
    assert next(iter(grpo.VARIANTS)) == grpo.DEFAULT


@pytest.mark.parametrize(
    ("arg", "nearest"),
    [
        ("qwen2.5-7", "qwen2.5-7b"),
        ("Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("qwen2.5-7b@8xh20", "qwen2.5-7b@8xh200"),
        ("ds-r1-distill-qwen-32b", "ds-r1-distill-qwen-7b"),
        ("?", ""),
    ],
)
def test_another_variant_is_refused_and_the_nearest_named(arg, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}") as error:
        grpo.get_config(arg)
    assert f"no variant {arg!r}" in str(error.value)
    assert all(name in str(error.value) for name in grpo.VARIANTS)


def test_the_docstring_lists_every_variant():
    for name, variant in grpo.VARIANTS.items():
        assert f"    {name} " in grpo.__doc__
        assert variant.spec in grpo.__doc__


def test_the_task_is_a_file_with_eurus_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config.load(grpo.get_config())
    with pytest.raises(ValueError, match="eurus2_rl.parquet is not a file"):
        tasks.build(run.task)
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        }
        for i in range(40)
    ]
    (tmp_path / "data").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / run.task.name)
    task = tasks.build(run.task)
    example = task.examples("train")[0]
    assert example.prompt[0]["role"] == "user"
    assert task.score(example, f"So it is \\boxed{{{example.answer}}}.") == 1.0
    assert task.score(example, f"So it is \\boxed{{{example.answer}1}}.") == 0.0


def test_the_command_line_takes_a_variant_and_the_users_file():
    arguments = [
        "--config=configs/grpo.py:llama-3.3-70b",
        "--workdir=unused",
        "--config.task.name=data/mine.jsonl",
        "--config.task.options.prompt_key=question",
        "--config.mesh.fsdp=16",
    ]
    (ran,) = command_lines.start([["tlt_jax.main", *arguments]], stop=True)
    assert (ran.status, ran.output) == (0, "would train 200 steps in unused\n"), ran
