"""The counting task: prompts, answers, their lengths, and what a text is worth."""

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import counting
from tlt_jax.settings import sections


def test_prompts_and_answers():
    task = tasks.build(sections.Task(name="counting", size=200), eval_size=32)
    train, held_out = task.examples("train"), task.examples("eval")
    for example in train:
        assert [turn["role"] for turn in example.prompt] == 2 * [
            "user",
            "assistant",
        ] + ["user"]
        assert example.prompt[1]["content"] == "3, 4, 5, 6, 7, 8, 9"
        message = example.prompt[-1]
        words = message["content"].split()
        first, last = int(words[2]), int(words[4].rstrip(","))
        wanted = list(range(first, last + 1))
        assert [int(n) for n in example.answer.split(", ")] == wanted
        assert 5 <= len(wanted) <= 50 and 1 <= first <= 40
        assert task.score(example, example.answer) == 1.0
    questions = {example.prompt[-1]["content"] for example in train}
    assert not questions & {example.prompt[-1]["content"] for example in held_out}
    lengths = [example.answer.count(",") + 1 for example in train]
    # P(num >= 10) = 1/2, P(num = 50) = 1/10.
    assert 0.35 < np.mean(np.array(lengths) >= 10) < 0.65
    assert 0.03 < np.mean(np.array(lengths) == 50) < 0.2


@pytest.mark.parametrize(
    "text,score",
    [
        ("3, 4, 5, 6", 1.0),
        ("Sure! 3, 4, 5 and 6.", 1.0),
        ("3, 4", 0.5),
        ("3, 4, 5, 6, 7, 8, 9, 10", 0.5),
        ("3, 5, 5, 6", 0.25),
        ("1, 2, 3, 4", 0.0),
        ("", 0.0),
    ],
)
def test_scores(text, score):
    example = types.Example("counting/train/0", (), "3, 4, 5, 6")
    assert counting.CountingTask().score(example, text) == score
    for mark in (0.5, 1.0):
        passed = counting.CountingTask(pass_mark=mark).score(example, text)
        assert passed == (1.0 if score >= mark else 0.0)


def test_bad_settings():
    with pytest.raises(ValueError, match="min_num=0"):
        counting.CountingTask(min_num=0)
    with pytest.raises(ValueError, match="max_start of at least 1"):
        counting.CountingTask(max_start=0)
    with pytest.raises(ValueError, match="num_shots=4: there are 0 to 3"):
        counting.CountingTask(num_shots=4)
    with pytest.raises(ValueError, match="pass_mark=2"):
        counting.CountingTask(pass_mark=2)
