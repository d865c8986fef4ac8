import collections
import itertools
import json
import pickle
import re

import numpy as np
import pytest

from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import generated
from tlt_jax.settings import sections

PRODUCTS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
}


def questions(task, split):
    return {e.metadata["question"] for e in task.examples(split)}


# Numbers, words, lists, grids; single and several lines; one checked by rule.
GENERATORS = [
    "products",
    "chain_sum",
    "gcd",
    "letter_counting",
    "spell_backward",
    "word_sorting",
    "number_sorting",
    "fraction_simplification",
    "mini_sudoku",
    "rotate_matrix",
    "simple_equations",
    "decimal_arithmetic",
    "needle_haystack",
]


@pytest.mark.parametrize("name", GENERATORS)
def test_gold_answers_score_one_in_every_style(name):
    for style, chat in itertools.product(("plain", "cot", "two_shot"), (True, False)):
        task = tasks.ReasoningGymTask(name, style=style, chat=chat, size=2)
        example = task.examples("train")[1]
        gold = example.answer
        assert task.score(example, f"Let me see.\nAnswer: {gold}") == 1.0
        assert task.score(example, "") == 0.0
        if style == "plain":
            assert task.score(example, f" {gold}") == 1.0
        if chat:
            assert task.score(example, f"<answer>{gold}</answer>") == 1.0


def test_merely_containing_the_answer_earns_nothing():
    task = tasks.ReasoningGymTask("chain_sum", size=4, options={"min_terms": 2})
    raw = tasks.ReasoningGymTask(
        "chain_sum", size=4, options={"min_terms": 2}, raw_score=True
    )
    example = task.examples("train")[0]
    gold = example.answer
    hedge = f"Answer: The answer is {gold}"
    assert task.score(example, hedge) == 0.0
    # The generator itself would pay for it, in proportion to the lengths.
    assert raw.score(example, hedge) == pytest.approx(
        len(gold) / len(f"The answer is {gold}")
    )
    # A number is looked for only where no place for the answer is marked.
    assert task.score(example, f"The answer is {gold}") == 1.0
    assert task.score(example, f"Answer: {gold} or {int(gold) + 1}") == 0.0
    assert task.score(example, f"Answer: {gold}\nAnswer: {int(gold) + 1}") == 0.0
    assert task.score(example, f"It is {gold}.\nAnswer:") == 0.0


@pytest.mark.parametrize(
    ("name", "addition"),
    [
        ("spell_backward", " or dog"),
        ("spell_backward", "dog"),
        ("spell_backward", "\n\nSpell another word: dog"),
        ("fraction_simplification", " or 7"),
        ("letter_jumble", " or dog"),
        ("quantum_lock", "xq"),
        ("knights_knaves", " or not"),
        ("polynomial_multiplication", " or 7"),
    ],
)
def test_hedges_that_verifiers_pay_in_full_earn_nothing(name, addition):
    raw, task = (
        tasks.ReasoningGymTask(name, size=4, raw_score=raw) for raw in (True, False)
    )
    paid = 0
    for example in task.examples("train"):
        hedge = f"{example.answer}{addition}"
        paid += raw.score(example, hedge) >= 0.99
        assert task.score(example, hedge) == 0.0
        assert task.score(example, f"{example.answer}") == 1.0
    assert paid, "this generator no longer needs the rule"


def test_another_form_of_the_right_answer_is_no_hedge():
    task = tasks.ReasoningGymTask("countdown", size=1)
    example = task.examples("train")[0]
    assert task.score(example, f"Answer: ({example.answer})") == 1.0
    task = tasks.ReasoningGymTask("chain_sum", size=1)
    example = task.examples("train")[0]
    assert task.score(example, f"Answer: **{example.answer}**.") == 1.0


def test_text_prompts_are_answered_by_the_first_line():
    # The prompt ends with `Answer:`; a base model goes on with questions of its own.
    for style, expected in (("plain", 1.0), ("two_shot", 1.0), ("cot", 0.0)):
        task = tasks.ReasoningGymTask("spell_backward", style=style, chat=False, size=1)
        example = task.examples("train")[0]
        text = f" {example.answer}\n\nSpell this word backward: dog"
        assert task.score(example, text) == expected, style


def test_a_task_checked_by_rule_has_no_answers_to_show():
    task = tasks.ReasoningGymTask("propositional_logic", size=2)
    example = task.examples("train")[0]
    assert example.answer is None
    assert task.score(example, "Answer: 3") == 0.0
    with pytest.raises(ValueError, match="no reference answers to show"):
        tasks.ReasoningGymTask("propositional_logic", size=2, style="two_shot")


def test_prompts_of_each_style():
    def prompt(style, chat):
        task = tasks.ReasoningGymTask(
            "products", options=PRODUCTS, style=style, chat=chat, size=1
        )
        example = task.examples("train")[0]
        return example.metadata["question"], example.prompt

    question, plain = prompt("plain", True)
    assert plain == ({"role": "user", "content": question},)
    _, text = prompt("plain", False)
    assert text == f"{question}\nAnswer:"
    question, (message,) = prompt("cot", True)
    assert message["content"].startswith(f"{question}\n\nThink step by step")
    _, text = prompt("cot", False)
    assert text.startswith(question) and text.endswith("answer.\n")
    question, turns = prompt("two_shot", True)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[-1]["content"] == question
    for asked, solved in (turns[:2], turns[2:4]):
        a, b = map(int, re.findall(r"\d+", asked["content"]))
        assert solved["content"] == f"Answer: {a * b}"
    _, text = prompt("two_shot", False)
    assert text == (
        f"{turns[0]['content']}\n{turns[1]['content']}\n\n"
        f"{turns[2]['content']}\n{turns[3]['content']}\n\n{question}\nAnswer:"
    )


def test_examples_are_the_same_whenever_they_are_asked_for():
    def make(seed):
        return tasks.ReasoningGymTask("gcd", seed=seed, size=20).examples("train")

    examples = make(3)
    assert [examples[i] for i in (7, 0, 7)] == [make(3)[7], make(3)[0], examples[7]]
    assert examples[-1] == examples[19] and examples[np.int64(2)] == examples[2]
    assert examples[3:5] == [examples[3], examples[4]]
    assert len({e.example_id for e in examples}) == len(examples) == 20
    with pytest.raises(IndexError):
        examples[20]
    other = {e.metadata["question"] for e in make(4)}
    assert len(other & {e.metadata["question"] for e in examples}) < 10


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_splits_and_shots_share_no_question(seeds):
    # Products of two digits are 81 questions: random streams alone would overlap.
    train, held_out = (
        tasks.ReasoningGymTask(
            "products",
            options=PRODUCTS,
            style="two_shot",
            seed=seed,
            size=300,
            eval_size=100,
        )
        for seed in seeds
    )
    asked, held = questions(train, "train"), questions(held_out, "eval")
    assert len(asked) > 50 and len(held) > 5
    assert not asked & held
    for task in (train, held_out):
        shots = {turn["content"] for turn in task.examples("eval")[0].prompt[:-1:2]}
        assert len(shots) == 2
        assert not shots & (questions(task, "train") | questions(task, "eval"))


def test_a_task_with_too_few_questions_says_so():
    def make(frac):
        options = PRODUCTS | {"max_terms": 2}
        return tasks.ReasoningGymTask("products", options=options, holdout_frac=frac)

    with pytest.raises(ValueError, match="too few different questions"):
        make(1e-9).examples("eval")[0]
    assert make(0.0).examples("eval")[0].answer


def test_tasks_survive_pickling():
    for task in (
        tasks.ReasoningGymTask("products", size=3),
        generated.ArithmeticTask(size=3),
        generated.CountTask(size=3),
    ):
        copy = pickle.loads(pickle.dumps(task))
        example = task.examples("train")[2]
        assert copy.examples("train")[2] == example
        assert copy.score(example, f" {example.answer}") == 1.0


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i}+1?", "answer": i + 1, "id": i} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(name, *functions, weights=(), eval_size=64, **keys):
    options = keys.pop("options", {})
    task = sections.Task(name=str(name), options=tuple(options.items()), **keys)
    reward = sections.Reward(functions, weights)
    return tasks.build(task, reward=reward, eval_size=eval_size)


def test_a_file_is_split_by_a_hash_of_its_prompts(sums):
    task = settings(sums)
    train, held_out = (list(task.examples(split)) for split in ("train", "eval"))
    assert len(train) + len(held_out) == 60 and 1 < len(held_out) < 20
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert task.score(train[0], rf"\boxed{{{train[0].answer}}}") == 1.0
    assert len(settings(sums, eval_size=1).examples("eval")) == 1
    whole = settings(sums, options={"eval_path": str(sums), "limit": 50})
    assert len(whole.examples("train")) == 50 and len(whole.examples("eval")) == 60
    none = settings(sums, options={"holdout_frac": 0.0})
    with pytest.raises(ValueError, match="no examples for the split 'eval'"):
        none.examples("eval")


def test_rewards_of_files(sums, tmp_path, monkeypatch):
    (tmp_path / "user_length.py").write_text("def fn(e, text): return len(text)")
    monkeypatch.syspath_prepend(tmp_path)
    text = {"exact": "x", "number": "1.0", "user_length:fn": "four"}
    for reward, expected in (("exact", 0.0), ("number", 1.0), ("user_length:fn", 4)):
        task = settings(sums, options={"reward": reward, "holdout_frac": 0.0})
        assert task.score(task.examples("train")[0], text[reward]) == expected
        task = settings(sums, reward, options={"holdout_frac": 0.0})
        assert task.score(task.examples("train")[0], text[reward]) == expected
        assert pickle.loads(pickle.dumps(task.score))
    sums.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="has no answer, which the reward 'math_ver"):
        settings(sums)
    with pytest.raises(ValueError, match="unknown reward 'exakt': did you mean 'exa"):
        settings(sums, "exakt")


def test_build_gives_settings_to_each_kind():
    task = settings(
        "products", size=7, seed=2, eval_size=5, options=PRODUCTS | {"style": "cot"}
    )
    assert task.name == "products"
    assert [len(task.examples(split)) for split in ("train", "eval")] == [7, 5]
    assert "step by step" in task.examples("train")[0].prompt[-1]["content"]
    task = settings("arithmetic", size=9, options={"max_operand": 3})
    assert len(task.examples("train")) == 9
    counts = collections.Counter(
        e.prompt for e in settings("count", options={"max_n": 3}).examples("train")
    )
    assert set(counts) == {"n=2:", "n=3:"}


def test_system_prompt_stands_before_every_prompt(sums):
    chat = settings("products", system_prompt="Be brief.").examples("eval")[0]
    assert chat.prompt[0] == {"role": "system", "content": "Be brief."}
    assert chat.prompt[1]["role"] == "user"
    task = settings("arithmetic", system_prompt="Add:")
    example = task.examples("train")[0]
    assert example.prompt.startswith("Add:\n")
    assert task.score(example, example.answer) == 1.0
    message = {"role": "system", "content": "x"}
    row = {"prompt": [message, {"role": "user", "content": "y"}], "answer": "1"}
    sums.write_text(json.dumps(row) + "\n")
    task = settings(sums, system_prompt="z", options={"holdout_frac": 0.0})
    with pytest.raises(ValueError, match="begins with a system message of its own"):
        task.examples("train")[0]


def test_another_reward_takes_the_place_of_the_verifier(tmp_path, monkeypatch):
    (tmp_path / "user_length.py").write_text("def fn(e, text): return len(text)")
    monkeypatch.syspath_prepend(tmp_path)
    task = settings("arithmetic", "user_length:fn")
    assert task.score(task.examples("train")[0], "four") == 4


def test_the_tasks_own_verifier_beside_others(sums, tmp_path, monkeypatch):
    (tmp_path / "user_length.py").write_text("def fn(e, text): return len(text)")
    monkeypatch.syspath_prepend(tmp_path)
    task = settings("arithmetic", "task", "user_length:fn", weights=(1.0, 0.5))
    example = task.examples("train")[0]
    verdict = task.score(example, example.answer)
    assert verdict.values == (1.0, len(example.answer))
    assert verdict.weights == (1.0, 0.5)
    own = {"reward": "number", "holdout_frac": 0.0}
    task = settings(sums, "user_length:fn", "task", options=own)
    verdict = task.score(task.examples("train")[0], "1.00")
    assert verdict.names == ("fn", "task") and verdict.values == (4, 1.0)
    # A file without answers is fine where nothing compares with one.
    sums.write_text('{"prompt": "x"}\n')
    task = settings(sums, "user_length:fn", options=own)
    assert task.score(task.examples("train")[0], "1.00") == 4
    for names in (("user_length:fn", "task"), ("user_length:fn", "number")):
        with pytest.raises(ValueError, match="has no answer, which the reward 'number"):
            settings(sums, *names, options=own)


def test_prompts_of_a_file_become_messages_if_asked(sums):
    plain, asked = settings(sums), settings(sums, options={"chat": True})
    for split in ("train", "eval"):
        pairs = zip(plain.examples(split), asked.examples(split), strict=True)
        for text, message in pairs:
            assert message.prompt == ({"role": "user", "content": text.prompt},)
            assert message.example_id == text.example_id
    told = settings(sums, options={"chat": True}, system_prompt="Add.")
    assert [m["role"] for m in told.examples("eval")[0].prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("prodcuts", {}, "unknown task 'prodcuts': did you mean 'products'"),
        ("aritmetic", {}, "did you mean 'arithmetic'"),
        ("xyzzy", {}, r"unknown task 'xyzzy'\. There are arithmetic, count"),
        ("products", {"max_term": 3}, "no option 'max_term'; did you mean 'max_terms'"),
        ("products", {"seed": 3}, "seed among its options: give the task's own"),
        ("products", {"min_terms": 0}, r"refuses its options \{'min_terms': 0\}"),
        ("products", {"style": "3-shot"}, "'3-shot' is not one of plain, cot, two_"),
        ("products", {"holdout_frac": 1.0}, "holdout_frac=1.0 is out of range"),
        ("arithmetic", {"max": 3}, "'arithmetic' has no option 'max'"),
        ("arithmetic", {"operators": "*"}, r"operators='\*': at least 1"),
        ("count", {"min_n": 9, "max_n": 3}, "min_n=9, max_n=3"),
        ("no/such.jsonl", {}, r"no/such\.jsonl is not a file"),
        ("x.jsonl", {"promt_key": "q"}, "no option 'promt_key'; did you mean 'prompt_"),
    ],
)
def test_build_names_what_is_wrong(name, keys, message):
    with pytest.raises(ValueError, match=message):
        settings(name, options=keys)
