"""Drawn tasks: literal questions, the laws they are drawn by, splits, scores."""

import itertools
import random
import re

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.tasks import generated


def asked(task, split, num):
    return [(e.prompt, e.answer) for e in task.examples(split)[:num]]


def test_questions_that_runs_have_begun_with():
    """Whoever draws otherwise gives every run other prompts."""
    task = generated.ArithmeticTask()
    assert asked(task, "train", 3) == [("3+3=", "6"), ("2+7=", "9"), ("0+2=", "2")]
    assert asked(task, "eval", 3) == [("2+3=", "5"), ("5+9=", "14"), ("9+9=", "18")]
    task = generated.ArithmeticTask(
        max_operand=12, num_terms=3, operators="+-", seed=5, size=4
    )
    assert asked(task, "train", 9) == [
        ("0-8-1=", "-9"),
        ("9-10+6=", "5"),
        ("0-1-10=", "-11"),
        ("5+6+7=", "18"),
    ]
    (*_, last) = task.examples("train")
    assert last.example_id == "arithmetic/train/3"
    task = generated.CountTask(seed=3, max_n=9, alpha=0.7)
    questions = [prompt for prompt, _ in asked(task, "train", 8)]
    assert " ".join(questions) == "n=2: n=3: n=4: n=9: n=4: n=6: n=9: n=6:"
    assert task.examples("eval")[1] == types.Example(
        "count/eval/1", "n=7:", "1 2 3 4 5 6 7"
    )


def test_what_is_held_out_depends_on_the_text_alone():
    # printf '1+2=' | b2sum -l 64: 1d5f6c6f8399fd4d, 0.1147 of all.
    share = 0x1D5F6C6F8399FD4D / 2**64
    assert generated.held_out("1+2=", share + 1e-9)
    assert not generated.held_out("1+2=", share - 1e-9)
    digits = itertools.product(range(4), repeat=2)
    sums = [f"{a}+{b}=" for a, b in digits]
    held = [text for text in sums if generated.held_out(text, 0.2)]
    assert held == ["0+3=", "1+2=", "2+3="]
    task = generated.ArithmeticTask(max_operand=3, size=200, eval_size=200)
    assert {prompt for prompt, _ in asked(task, "eval", 200)} == set(held)
    assert {prompt for prompt, _ in asked(task, "train", 200)} == set(sums) - set(held)
    task = generated.ArithmeticTask(max_operand=3, holdout_frac=0.0, eval_size=200)
    assert {prompt for prompt, _ in asked(task, "eval", 200)} == set(sums)


def test_examples_are_a_sequence():
    made = []
    examples = generated.LazyExamples(5, lambda i: made.append(i) or 10 * i)
    assert len(examples) == 5 and not made
    assert examples[-1] == 40 and examples[np.int64(2)] == 20
    assert examples[3:0:-2] == [30, 10] and made == [4, 2, 3, 1]
    assert list(examples) == [0, 10, 20, 30, 40]
    for index in (5, -6):
        with pytest.raises(IndexError):
            examples[index]
    with pytest.raises(TypeError):
        examples["1"]


def test_draws_are_the_first_that_fit():
    task = generated.GeneratedTask("x", 1, 1, holdout_frac=0.5)
    held = [n for n in range(99) if generated.held_out(f"{n}", 0.5)]
    tried = []

    def make(attempt):
        tried.append(attempt)
        return f"{attempt}", attempt

    assert task.draw("eval", make) == (f"{held[0]}", held[0])
    assert tried == list(range(held[0] + 1))
    with pytest.raises(ValueError) as raised:
        task.draw("train", lambda _: (f"{held[0]}", None))
    assert str(raised.value) == (
        "task 'x': 250 draws gave no question for this split; the task has too few "
        "different questions. Make it harder, or change holdout_frac (0: the splits "
        "may share questions)."
    )


def test_a_tail_of_any_weight():
    rng = random.Random(1)
    found = [generated.pareto(rng, 2, 50, 0.8) for _ in range(12)]
    assert found == [2, 20, 12, 2, 4, 4, 7, 13, 2, 2, 19, 4]
    # So heavy that nearly all are the largest, and its power would overflow.
    assert generated.pareto(random.Random(1), 1, 64, 1e-4) == 64
    assert generated.pareto(random.Random(1), 3, 3, 2.0) == 3


@pytest.mark.parametrize("operators", ["+", "-", "+-"])
def test_arithmetic(operators):
    task = generated.ArithmeticTask(
        max_operand=12, num_terms=3, operators=operators, size=60, eval_size=40
    )
    for split in ("train", "eval"):
        for example in task.examples(split):
            assert set(example.prompt + example.answer) <= set(task.alphabet)
            terms = [int(t) for t in re.findall(r"[+-]?\d+", example.prompt)]
            assert len(terms) == 3 and sum(terms) == int(example.answer)
            assert task.score(example, example.answer + " ") == 1.0
            assert task.score(example, f"{int(example.answer) + 1}") == 0.0
            assert task.score(example, f"{example.answer} or 3") == 0.0
    prompts = {s: {e.prompt for e in task.examples(s)} for s in ("train", "eval")}
    assert not prompts["train"] & prompts["eval"]
    again = generated.ArithmeticTask(
        max_operand=12, num_terms=3, operators=operators, size=60, eval_size=40
    )
    assert list(again.examples("train")) == list(task.examples("train"))
    assert task.supervised_text(2) == [
        (e.prompt, e.answer) for e in task.examples("train")[:2]
    ]


def test_arithmetic_by_default_looks_like_this():
    task = generated.ArithmeticTask()
    assert task.alphabet == "0123456789=+"
    assert all(re.fullmatch(r"\d\+\d=", e.prompt) for e in task.examples("train")[:50])


def test_count_has_the_tail_that_was_asked_for():
    task = generated.CountTask(min_n=2, max_n=64, alpha=1.0, size=8000)
    lengths = np.array([len(e.answer.split()) for e in task.examples("train")])
    assert lengths.min() == 2 and lengths.max() == 64
    for k in (3, 4, 8, 16, 32, 64):
        expected = 2 / k
        error = 4 * np.sqrt(expected * (1 - expected) / len(lengths))
        assert abs((lengths >= k).mean() - expected) < error, k
    example = next(e for e in task.examples("train") if e.prompt == "n=4:")
    assert example.answer == "1 2 3 4"
    assert set(example.prompt + example.answer) <= set(task.alphabet)


@pytest.mark.parametrize(
    ("text", "exact", "partial"),
    [
        ("1 2 3 4", 1.0, 1.0),
        (" 1 2 3 4\n", 1.0, 1.0),
        ("1 2", 0.0, 0.5),
        ("1 2 3 4 5 6 7 8", 0.0, 0.5),
        ("1 2 4 4", 0.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_count_scores(text, exact, partial):
    for credit, score in ((False, exact), (True, partial)):
        task = generated.CountTask(partial_credit=credit)
        example = next(e for e in task.examples("train") if e.prompt == "n=4:")
        assert task.score(example, text) == score


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="size=0 is out of range"):
        generated.ArithmeticTask(size=0)
    with pytest.raises(ValueError, match="eval_size=2097153 is out of range: from"):
        generated.CountTask(eval_size=2**21 + 1)
    generated.CountTask(eval_size=2**21)
    for frac in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"holdout_frac={frac} is out of range"):
            generated.ArithmeticTask(holdout_frac=frac)
