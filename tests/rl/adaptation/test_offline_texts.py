"""Which prompts a drafter's texts begin with, and that those of others stay apart."""

import json

import numpy as np
import pytest

from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.settings import drafter_run, schema


class Kept:
    """Stands for the shards: texts of these ids are on disk."""

    def __init__(self, *text_ids):
        self.text_ids = text_ids


def encode(example):
    """Three tokens of a prompt, made of its first characters."""
    prompt = example.prompt
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    return np.array([ord(c) for c in text[:3]] + [len(text)], np.int32)


def ask(**settings):
    chosen = {"tasks": ("count", "chat"), "num": 5, "num_held_out": 3, "seed": 4}
    texts = drafter_run.Texts(**chosen | {"max_new_tokens": 9} | settings)
    return offline_texts.ask(texts, encode)


def test_tasks_take_turns_and_held_out_texts_have_ids_of_their_own():
    asked = ask()
    first = offline_texts.HELD_OUT
    assert first == 1 << 40
    assert [r.request_id for r in asked] == [*range(5), first, first + 1, first + 2]
    # Each has a prompt of its own: nothing is shared among them.
    assert all(r.prompt_id == r.request_id for r in asked)
    assert {r.max_new_tokens for r in asked} == {9}
    # Only prompts of `count` begin with "n=".
    counts = [bytes(r.prompt[:2].tolist()) == b"n=" for r in asked]
    assert counts == [True, False, True, False, True, True, False, True]


def test_more_texts_move_none_and_another_seed_asks_others():
    def prompts(asked):
        return {r.request_id: r.prompt.tolist() for r in asked}

    base, more = prompts(ask()), prompts(ask(num=6))
    assert base == {number: more[number] for number in base}
    assert base != prompts(ask(seed=5))


def test_a_task_named_twice_gives_other_prompts_the_second_time():
    asked = ask(tasks=("chat", "chat"), num=12)
    once = [r.prompt.tolist() for r in asked[0:12:2]]
    again = [r.prompt.tolist() for r in asked[1:12:2]]
    assert once != again
    assert once == [r.prompt.tolist() for r in ask(tasks=("chat",), num=6)[:6]]


def test_rounds_ask_other_prompts_and_hold_the_same_out():
    def asked(number):
        texts = drafter_run.Texts(
            tasks=("count", "chat"), num=5, num_held_out=3, seed=4
        )
        return {
            r.request_id: r.prompt.tolist()
            for r in offline_texts.ask(texts, encode, number)
        }

    first, third = asked(0), asked(2)
    assert [*third][:5] == [10, 11, 12, 13, 14]
    assert [first[i] for i in range(5)] != [third[i] for i in range(10, 15)]
    held_out = range(offline_texts.HELD_OUT, offline_texts.HELD_OUT + 3)
    assert [first[i] for i in held_out] == [third[i] for i in held_out]


def test_rounds_have_steps_and_texts():
    rounds = offline_texts.Rounds(num_texts=10, num_steps=4, kept=3)
    assert [rounds.place(step) for step in (0, 3, 4, 9)] == [
        *((0, 0), (0, 3), (1, 0), (2, 1)),
    ]
    assert [rounds.text_ids(number) for number in (0, 1, 2, 5)] == [
        *(range(0, 10), range(0, 20), range(0, 30), range(30, 60)),
    ]
    # One that has no end.
    assert offline_texts.Rounds(num_texts=10).place(7) == (0, 7)


def test_a_task_can_have_a_style_and_numbers():
    def prompt(name):
        return offline_texts._task(name, 0, 4).examples("train")[0].prompt

    assert prompt("products")[-1]["content"].startswith("Solve the following mult")
    asked = prompt("products:cot,min_digits=1,max_digits=1")[-1]["content"]
    assert asked.endswith("followed by the answer.") and ": 1 * 4." in asked
    assert len(prompt("chain_sum:two_shot")) == 5
    assert offline_texts.task_of("products:cot,min_digits=1") == "products"
    assert offline_texts.task_of("hub:a/b") == "hub:a/b"
    with pytest.raises(ValueError, match="has no option 'max_digit'; did you mean"):
        prompt("products:cot,max_digit=1")


def test_missing_are_the_ids_that_are_not_there():
    asked = ask()
    wanted = {1, 3, 4, offline_texts.HELD_OUT}
    there = {r.request_id for r in asked} - wanted
    assert offline_texts.missing(asked, Kept(*there, 99)) == wanted


def test_texts_of_other_settings_are_not_mixed(tmp_path):
    folder = tmp_path / "a" / "texts"
    settings = {"model": "m", "seed": 4, "tasks": ("count", "chat")}
    offline_texts.claim(folder, settings)
    about = json.loads((folder / "about.json").read_text())
    assert about == {"model": "m", "seed": 4, "tasks": ["count", "chat"]}
    offline_texts.claim(folder, settings)
    with pytest.raises(schema.ConfigError) as error:
        offline_texts.claim(folder, settings | {"seed": 5})
    assert str(error.value) == (
        f"{folder} holds texts made with seed=4, not 5: use another --workdir, or "
        "delete them."
    )
    # What was refused has changed nothing.
    assert json.loads((folder / "about.json").read_text()) == about
    assert [path.name for path in folder.iterdir()] == ["about.json"]
