"""The task of random numbers: prompts, and what a list is worth."""

import re

import pytest

from tlt_jax import types
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import random_numbers
from tlt_jax.settings import sections

MAKE = random_numbers.RandomNumbersTask


def test_prompts():
    task = tasks.build(sections.Task(name="random_numbers", size=100), eval_size=32)
    train, held_out = task.examples("train"), task.examples("eval")
    for example in train:
        assert len(example.prompt) == 5
        for question, answer in zip(
            example.prompt[:-1:2], example.prompt[1::2], strict=True
        ):
            shown = types.Example("a", (), " of ".join(asked(question)))
            assert task.score(shown, answer["content"]) == 1.0
        num, top = map(int, asked(example.prompt[-1]))
        assert 10 <= num <= 30 and 60 <= top <= 100
        assert example.answer == f"{num} of {top}"
    questions = {example.prompt[-1]["content"] for example in train}
    assert len(questions) > 80
    assert not questions & {example.prompt[-1]["content"] for example in held_out}


def asked(turn):
    assert turn["role"] == "user"
    pattern = r"Write (\d+) different random numbers from 1 to (\d+), .*"
    return re.fullmatch(pattern, turn["content"]).groups()


@pytest.mark.parametrize(
    "text,score",
    [
        ("7, 1, 9, 3", 1.0),
        ("Here: 7 1 9 3.", 1.0),
        ("7, 1", 0.5),
        ("7, 7, 7, 7", 0.25),
        ("7, 1, 0, 11", 0.5),
        ("7, 1, 9, 3, 4, 5, 6, 8", 0.5),
        ("9" * 40, 0.0),
        ("", 0.0),
    ],
)
def test_scores(text, score):
    assert MAKE().score(types.Example("a", (), "4 of 10"), text) == score


def test_bad_settings():
    for given in ({"min_num": 0}, {"max_top": 59}, {"num_shots": -1}):
        with pytest.raises(ValueError, match="at least twice max_num"):
            MAKE(**given)
