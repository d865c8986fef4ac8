import pickle
import threading

import pytest

from tlt_jax import types
from tlt_jax.rl.tasks import rewards


@pytest.mark.parametrize(
    ("text", "numeric", "multiline", "answer"),
    [
        ("So 3.\nAnswer: 12", True, False, "12"),
        ("answer :12\nbecause", True, False, "12"),
        ("**Final Answer:** 12 apples", True, False, "12 apples"),
        ("Answer:\n\n  12\nmore", True, False, "12"),
        ("Answer: 1\nQuestion: 2+2\nAnswer: 4", True, False, "4"),
        ("Answer: 11 or 12", True, False, "11 or 12"),
        ("It is 12.\nAnswer:", True, False, None),
        ("<answer>1</answer> no, <answer> 2 </answer>", True, False, "2"),
        ("<answer>1</answer> Answer: 2", True, False, "2"),
        ("<answer></answer> 3", True, False, None),
        ("7 + 5 = 12.", True, False, "12"),
        ("no idea", True, False, None),
        ("  olleh \n", False, False, "olleh"),
        ("the word is\nolleh", False, False, "the word is\nolleh"),
        ("Answer: 1 2\n3 4\n", False, True, "1 2\n3 4"),
        ("", False, False, None),
        ("", True, False, None),
    ],
)
def test_extract_answer(text, numeric, multiline, answer):
    got = rewards.extract_answer(text, numeric=numeric, multiline=multiline)
    assert got == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7-5", "5"),
        ("7 - 5 = -5", "-5"),
        ("x = \u22127", "-7"),
        ("(3)-4", "4"),
        ("1,234,567.89 and no more", "1234567.89"),
        ("it costs $-25.", "-25"),
        ("half is 1/2", "1/2"),
        ("1.5e3", "1.5e3"),
        ("about .5", ".5"),
        ("H2O", None),
        ("v1.2", None),
        ("5kg", "5"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert rewards.last_number(text) == number


@pytest.mark.parametrize(
    ("decorated", "plain"),
    [
        ("**12**.", "12"),
        (r"$\boxed{12}$", "12"),
        (r"\(x+1\)", "x+1"),
        ('"word".', "word"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}"),
        ("-3", "-3"),
    ],
)
def test_undecorated(decorated, plain):
    assert rewards.undecorated(decorated) == plain


@pytest.mark.parametrize(
    ("answer", "gold", "hedging"),
    [
        ("cat or dog", "cat", True),
        ("cats", "cat", True),
        ("a cat", "cat", True),
        ("cat", "cat", False),
        ("(cat).", "cat", False),
        ("dog", "cat", False),
        ("5 or 6", "5", True),
        ("15", "5", False),
        ("5.0", "5", False),
        (r"\frac{1}{2}$ or 7", r"$\frac{1}{2}$", True),
        (r"\frac{1}{2}", r"$\frac{1}{2}$", False),
        (r"\boxed{3}", r"\boxed{3}", False),
    ],
)
def test_hedges(answer, gold, hedging):
    assert rewards.hedges(answer, gold) == hedging


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("cat", "Answer: cat", 1.0),
        ("cat", "Answer: **cat**.", 1.0),
        ("cat", "cat", 1.0),
        ("cat", "Answer: cat or dog", 0.0),
        ("cat", "a cat", 0.0),
        ("cat", "Cat", 0.0),
        ("-633", "it is -633", 1.0),
        ("1\n2", "Answer:\n1\n2", 1.0),
        ("1\n2", "Answer:\n1", 0.0),
    ],
)
def test_exact_match(gold, text, score):
    assert rewards.exact_match(gold, text) == score


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("1234", "so 1,234.", 1.0),
        ("0.5", "Answer: 1/2", 1.0),
        ("1/3", "Answer: 0.333", 0.0),
        ("12", "Answer: $12$.", 1.0),
        ("12", "Answer: 12 or 13", 0.0),
        ("12", "12 or 13", 0.0),
        ("12", "nothing", 0.0),
        ("0", "Answer: 1/0", 0.0),
        ("5", "Answer: 1e999999999", 0.0),
        ("5", "9" * 5000, 0.0),
    ],
)
def test_number_match(gold, text, score):
    assert rewards.number_match(gold, text) == score


def test_number_match_refuses_a_gold_answer_that_is_no_number():
    with pytest.raises(ValueError, match="'x' is not a number: use the reward"):
        rewards.number_match("x", "5")


MATH = [
    ("1/2", r"so \boxed{\frac{1}{2}}", 1.0),
    (r"\frac{1}{2}", "The answer is 0.5", 1.0),
    ("1234", "Answer: 1,234", 1.0),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
    (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1.0),
    ("3", r"\boxed{4}", 0.0),
    ("3", "no idea", 0.0),
    ("1", r"\boxed{1} \boxed{2}", 0.0),
]


def test_math_verify_score_also_off_the_main_thread():
    got = []

    def score():
        got.extend(rewards.math_verify_score(gold, text) for gold, text, _ in MATH)

    # Its own time limit would raise here: signals belong to the main thread.
    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert got == [score for *_, score in MATH]


def test_math_verify_refuses_a_gold_answer_that_it_cannot_read():
    with pytest.raises(ValueError, match="'' is not mathematics"):
        rewards.math_verify_score("", "5")


MODULE = """
not_callable = 3
by_length = lambda example, text: float(len(text))
def one(example): return 1.0
def three(example, text, extra): return 1.0
def good(example, text, scale=1.0): return scale * (text == example.answer)
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_scores.py").write_text(MODULE)
    (tmp_path / "user_broken.py").write_text("raise RuntimeError('no GPU here')")
    (tmp_path / "user_needy.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("user_scores", "accepted is 'package.module:name'"),
        ("user_scores:", "accepted is 'package.module:name'"),
        ("user_absent:good", "there is no module 'user_absent'"),
        ("user_absent.sub:good", "there is no module 'user_absent'"),
        ("user_needy:good", "it needs the module 'not_installed_anywhere'"),
        ("user_broken:good", "fails with RuntimeError: no GPU here"),
        ("user_scores:god", "has no 'god'; did you mean 'good'"),
        ("user_scores:not_callable", "of type int, which cannot be called"),
        ("user_scores:one", r"signature \(example\): it is called with two"),
        ("user_scores:three", r"signature \(example, text, extra\)"),
    ],
)
def test_load_function_says_what_is_wrong(user_module, path, message):
    with pytest.raises(ValueError, match=message) as error:
        rewards.load_function(path)
    assert repr(path) in str(error.value)


EXAMPLE = types.Example("e", "2+2?", "4")


def test_named_rewards_survive_pickling(user_module):
    for name, text in (
        ("user_scores:good", "4"),
        ("user_scores:by_length", "x"),
        ("exact", "4"),
        ("number", "4.0"),
        ("math_verify", "8/2"),
    ):
        function = pickle.loads(pickle.dumps(rewards.named(name)))
        assert function(EXAMPLE, text) == 1.0, name


def test_named_refuses_unknown_names_and_missing_answers():
    with pytest.raises(ValueError, match="'exat': did you mean 'exact'"):
        rewards.named("exat")
    unanswered = types.Example("e", "2+2?", None)
    with pytest.raises(ValueError, match="'e' has no answer to compare"):
        rewards.named("number")(unanswered, "4")


def test_one_function_stays_as_it_is():
    def own(example, text):
        return 0.5

    assert rewards.combined((), (), own) is own
    assert rewards.combined(("task",), (1.0,), own) is own
    assert rewards.combined(("exact",), (), own)(EXAMPLE, "4") == 1.0
    # With a weight it is a sum of one.
    half = rewards.combined(("exact",), (0.5,), own)(EXAMPLE, "4")
    assert half == rewards.Verdict(("exact",), (1.0,), (0.5,))


def test_several_functions_are_asked_one_after_the_other(user_module):
    def own(example, text):
        return 0.25

    names = ("number", "task", "user_scores:by_length")
    judge = rewards.combined(names, (1.0, 2.0, -0.5), own)
    assert judge.names == ("number", "task", "by_length")
    assert judge(EXAMPLE, "4.0") == rewards.Verdict(
        ("number", "task", "by_length"), (1.0, 0.25, 3.0), (1.0, 2.0, -0.5)
    )
    others = rewards.combined(("exact", "user_scores:good"), (), own)
    again = pickle.loads(pickle.dumps(others))
    assert again(EXAMPLE, "4").values == (1.0, 1.0)
    with pytest.raises(ValueError, match="'user_scores:god': module 'user_scores' has"):
        rewards.combined(("task", "user_scores:god"), (), own)
    with pytest.raises(ValueError, match="'tusk': did you mean 'task'"):
        rewards.combined(("exact", "tusk"), (), own)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("task exact a.b:close", "task exact close"),
        # Equal names are told apart by their modules.
        ("a.b:close c:close exact", "a.b.close c.close exact"),
        ("exact a:exact", "exact a.exact"),
        # What else the record says of rewards is not hidden.
        ("a:mean a:num_failed task", "a.mean a.num_failed task"),
        ("a:_Close A:Länge task", "close l_nge task"),
    ],
)
def test_names_in_the_record(names, expected):
    assert rewards.record_names(names.split()) == tuple(expected.split())


@pytest.mark.parametrize("names", ["exact exact", "a:f b:g a:f", "a:Good a:good"])
def test_a_function_is_named_once(names):
    with pytest.raises(ValueError, match="twice: name each function once, and say by"):
        rewards.record_names(names.split())
