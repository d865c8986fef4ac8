"""Models made on the spot: what they know, the same each time, whole or not at all."""

import itertools
import json
import os
import pathlib
import runpy

import jax
import numpy as np
import pytest

from tlt_jax import config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import source
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import generated, scratch_model
from tlt_jax.settings import schema, sections
from tlt_jax.workdir import files

RECIPE = pathlib.Path(__file__).resolve().parents[3] / "configs" / "tiny.py"
SIZES = dict(num_layers=1, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)


def run_config(**pretrain_settings) -> config.RunConfig:
    """Sums of digits up to 3: sixteen questions, none held out."""
    settings = dict(steps=150, num_rows=32, learning_rate=2e-2, noise_frac=0.0)
    return config.load(
        {
            "model": {"spec": "scratch"},
            "task": {
                "name": "arithmetic",
                "options": {"max_operand": 3, "holdout_frac": 0.0},
                "size": 100,
                "max_prompt_tokens": 8,
            },
            "rollout": {"max_new_tokens": 4},
            "pretrain": SIZES | settings | pretrain_settings,
        }
    )


def about(run: config.RunConfig) -> scratch_model.Settings:
    return scratch_model.Settings(
        run.seed, run.pretrain, run.task, run.rollout.max_new_tokens
    )


def make(directory, run=None, **settings):
    """Make a model; return the steps that progress was told of."""
    run = run or run_config(**settings)
    told = []
    scratch_model.make(
        about(run),
        tasks.build(run.task),
        directory,
        lambda *progress: told.append(progress),
    )
    return told


def answer_probs(params, cfg, texts) -> np.ndarray:
    """Probability that each text's answer is sampled at temperature 1, EOS included.

    For a task that pays for the exact answer alone this is the expected reward.
    """
    width = max(len(q) + len(a) for q, a in texts)
    loss = jax.jit(scratch_model.loss, static_argnames="cfg")
    return np.array(
        [
            np.exp(
                -len(a)
                * loss(params, scratch_model.lay_out([[(q, a)]], width), cfg=cfg)
            )
            for q, a in texts
        ]
    )


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A directory with a model that saw right answers only, and its progress."""
    directory = tmp_path_factory.mktemp("pretrain") / "below" / "model"
    return directory, make(directory)


def test_a_model_learns_its_task_and_starts_where_its_noise_says(learnt, tmp_path):
    directory, told = learnt
    assert [step for step, _, _ in told] == [*range(20, 150, 20), 150]
    assert all(total == 150 for _, total, _ in told)
    assert told[-1][2] < 0.5 * told[0][2]

    found = source.resolve(str(directory))
    tokenizer = found.tokenizer()
    assert found.config.eos_ids == tokenizer.eos_ids == (2,)
    assert found.config.vocab_size == tokenizer.vocab_size
    assert found.config.max_positions >= 12
    _, texts = scratch_model.read(tasks.build(run_config().task))
    texts = texts[:20]
    trained = answer_probs(found.load(), found.config, texts).mean()
    untrained = model_params.init(found.config, jax.random.key(0))
    assert trained > 0.9 > 0.05 > answer_probs(untrained, found.config, texts).mean()

    make(tmp_path / "spoilt", noise_frac=0.5)
    spoilt = source.resolve(str(tmp_path / "spoilt"))
    probs = answer_probs(spoilt.load(), spoilt.config, texts)
    # An answer that is exchanged may be right by chance.
    assert 0.3 < probs.mean() < 0.75


def test_weights_are_a_function_of_the_settings(learnt, tmp_path):
    def weights(directory):
        return (directory / "model.safetensors").read_bytes()

    make(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(learnt[0])
    for seed in (0, 1):
        run = run_config(steps=0)
        run = config.load(schema.to_dict(run) | {"seed": seed})
        make(tmp_path / f"seed_{seed}", run)
    assert weights(tmp_path / "seed_0") != weights(tmp_path / "seed_1")


def test_a_model_does_not_depend_on_the_number_of_threads(
    learnt, tmp_path, monkeypatch
):
    """One of several processes, with its share of the cores, makes what one does."""
    monkeypatch.setenv("NPROC", "1")
    assert [step for step, *_ in make(tmp_path / "model")][-1] == 150
    files = (folder / "model.safetensors" for folder in (tmp_path / "model", learnt[0]))
    first, second = (file.read_bytes() for file in files)
    assert first == second


def test_what_a_kill_leaves_has_the_name_by_which_it_is_removed(tmp_path, monkeypatch):
    there = []

    def save(*_, **__):
        there.append(len(os.listdir(tmp_path)))
        files.remove_remains(tmp_path)
        there.append(len(os.listdir(tmp_path)))
        raise KeyboardInterrupt

    monkeypatch.setattr(scratch_model.convert, "save", save)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "model", steps=1)
    assert there == [1, 0]


def test_a_complete_directory_is_used_again(tmp_path):
    directory = tmp_path / "model"
    make(directory, steps=0)
    before = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
    make(directory, steps=0)
    assert {p.name: p.stat().st_mtime_ns for p in directory.iterdir()} == before
    with pytest.raises(ValueError, match=r"'steps': 0.*'steps': 9.*delete it"):
        make(directory, steps=9)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("lost", sorted(scratch_model._FILES))
def test_a_directory_that_lacks_files_is_made_again(tmp_path, lost):
    directory = tmp_path / "model"
    make(directory, steps=0)
    whole = {p.name: p.read_bytes() for p in directory.iterdir()}
    for path in directory.iterdir():
        path.write_bytes(b"")
    (directory / lost).unlink()
    make(directory, steps=0)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == whole


def test_what_somebody_else_put_there_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    make(tmp_path / "model", steps=0)  # An empty directory is nobody's.
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"there is notes\.txt: name another"):
        make(tmp_path / "model", steps=0)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="move it away"):
        make(tmp_path / "model" / "notes.txt", steps=0)


@pytest.mark.parametrize("moment", ["teaching", "writing", "publishing"])
def test_a_making_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, moment):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    rename = os.rename

    def rename_others(source, target):
        interrupt() if target == str(tmp_path / "model") else rename(source, target)

    if moment == "teaching":
        monkeypatch.setattr(scratch_model, "train", interrupt)
    elif moment == "writing":
        monkeypatch.setattr(scratch_model.convert, "save", interrupt)
    else:
        monkeypatch.setattr(os, "rename", rename_others)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "model", steps=0)
    assert os.listdir(tmp_path) == []


def test_tasks_that_teach_nothing_are_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "3+4=", "answer": "7"}\n' * 20)
    others = [
        sections.Task(name=str(path)),
        sections.Task(name="count", system_prompt="Count."),
    ]
    for task in others:
        with pytest.raises(ValueError, match="'arithmetic' or 'count' can.*empty"):
            scratch_model.make(
                about(run_config()), tasks.build(task), tmp_path / "model"
            )
    for name in scratch_model.TASKS:
        tokenizer, texts = scratch_model.read(
            tasks.build(sections.Task(name=name, size=5))
        )
        question, answer = texts[0]
        assert len(texts) == 5 and answer[-1] == 2
        example = tasks.build(sections.Task(name=name, size=5)).examples("train")[0]
        assert tokenizer.decode(question) == example.prompt
        assert tokenizer.decode(answer) == example.answer


@pytest.mark.parametrize(
    "sizes,message",
    [
        (dict(d_model=17), "d_model=17"),
        (dict(num_kv_heads=3), "num_kv_heads=3"),
        (dict(head_dim=7), "head_dim=7"),
    ],
)
def test_sizes_of_no_model_are_refused_before_the_work(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "model", steps=10**9, **sizes)
    with pytest.raises(schema.ConfigError, match=r"pretrain\.noise_frac=1\.5"):
        run_config(noise_frac=1.5)


def some_texts(rng, num, longest=5):
    def draw():
        return rng.integers(3, 9, size=rng.integers(1, longest + 1)).astype(np.int32)

    return [(draw(), draw()) for _ in range(num)]


def test_rows_hold_every_text_once_in_order():
    rng = np.random.default_rng(0)
    texts = some_texts(rng, 200)
    rows = list(itertools.islice(scratch_model.fill(itertools.cycle(texts), 12), 40))
    sizes = [sum(len(q) + len(a) for q, a in row) for row in rows]
    assert max(sizes) <= 12 and np.mean(sizes) > 8
    flat = [text for row in rows for text in row]
    for got, want in zip(flat, itertools.cycle(texts), strict=False):
        assert got[0] is want[0] and got[1] is want[1]


def test_rows_are_laid_out_side_by_side():
    one, two = (np.array([3, 4]), np.array([5, 2])), (np.array([6]), np.array([7, 2]))
    batch = scratch_model.lay_out([[one, two], [two]], 8)
    np.testing.assert_array_equal(
        batch.tokens, [[3, 4, 5, 2, 6, 7, 2, 0], [6, 7, 2, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.positions, [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.segment, [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        batch.answered, [[0, 0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    )


def test_a_packed_row_costs_what_its_texts_cost_alone():
    tokenizer, _ = scratch_model.read(tasks.build(run_config().task))
    texts = some_texts(np.random.default_rng(1), 7)
    cfg = scratch_model.model_of(about(run_config()), tokenizer, texts)
    params = model_params.init(cfg, jax.random.key(0))
    alone = -np.log(answer_probs(params, cfg, texts))
    tokens = sum(len(answer) for _, answer in texts)
    rows = [texts[:3], texts[3:4], texts[4:]]
    packed = scratch_model.loss(params, scratch_model.lay_out(rows, 40), cfg=cfg)
    np.testing.assert_allclose(packed, alone.sum() / tokens, rtol=1e-5)


@pytest.mark.parametrize("noise_frac", [0.0, 0.3, 1.0])
def test_the_given_part_of_the_answers_is_exchanged(noise_frac):
    texts = [(np.array([i]), np.array([i])) for i in range(1000)]
    stream = scratch_model.noisy(texts, noise_frac, np.random.default_rng(0))
    drawn = [(int(q[0]), int(a[0])) for q, a in itertools.islice(stream, 4000)]
    assert abs(np.mean([q != a for q, a in drawn]) - noise_frac) < 0.02
    assert len({q for q, _ in drawn}) > 950


@pytest.mark.parametrize("variant", ["", *scratch_model.TASKS])
def test_the_tiny_recipe_has_room_for_its_task(variant):
    get_config = runpy.run_path(str(RECIPE))["get_config"]
    run = config.load(get_config(variant))
    assert run.model.spec == "scratch"
    assert run.task.name == (variant or "arithmetic")
    tokenizer, texts = scratch_model.read(tasks.build(run.task))
    assert max(len(q) for q, _ in texts) <= run.task.max_prompt_tokens
    assert max(len(a) for _, a in texts) <= run.rollout.max_new_tokens
    cfg = scratch_model.model_of(about(run), tokenizer, texts)
    assert model_params.count(cfg) < 1_000_000


def test_the_tiny_recipe_names_its_variants():
    get_config = runpy.run_path(str(RECIPE))["get_config"]
    with pytest.raises(ValueError, match="use arithmetic .*, count or experts"):
        get_config("sums")


def test_the_record_says_what_the_weights_depend_on(tmp_path):
    make(tmp_path / "model", steps=0)
    record = json.loads((tmp_path / "model" / "pretrain.json").read_text())
    assert record["seed"] == 0 and record["task"]["name"] == "arithmetic"
    assert set(record["pretrain"]) == set(SIZES) | set(
        "steps num_rows learning_rate noise_frac".split()
    )
    assert isinstance(generated.ArithmeticTask(), scratch_model.Teachable)
