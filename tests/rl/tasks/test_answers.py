import fractions
import functools
import time

import pytest

from tlt_jax.rl.tasks import answers


@pytest.mark.parametrize(
    ("text", "kind", "multiline", "answer"),
    [
        ("So 3.\nAnswer: 12", "number", False, "12"),
        ("answer :12\nbecause", "number", False, "12"),
        ("**Final Answer:** 12 apples", "number", False, "12 apples"),
        ("Answer:\n\n  12\nmore", "number", False, "12"),
        ("Answer: 1\nQuestion: 2+2\nAnswer: 4", "number", False, "4"),
        ("Answer: 11 or 12", "number", False, "11 or 12"),
        ("It is 12.\nAnswer:", "number", False, None),
        ("<answer>1</answer> no, <answer> 2 </answer>", "number", False, "2"),
        ("<answer>1</answer> Answer: 2", "number", False, "2"),
        ("<answer></answer> 3", "number", False, None),
        ("7 + 5 = 12.", "number", False, "12"),
        ("no idea", "number", False, None),
        ("  olleh \n", "text", False, "olleh"),
        ("the word is\nolleh", "text", False, "the word is\nolleh"),
        ("Answer: 1 2\n3 4\n", "text", True, "1 2\n3 4"),
        ("", "text", False, None),
        ("", "number", False, None),
        (r"\boxed{41}. (not 42)", "number", False, "41"),
        (r"\boxed{a{b}} since c", "text", False, "a{b}"),
        (r"\boxed{\boxed{cat}}", "text", False, "cat"),
        (r"\boxed{x = \boxed{3}}", "formula", False, "x = 3"),
        (r"\boxed {41}, then \boxed{42", "number", False, "41"),
        (r"\boxed{42", "number", False, None),
        (r"{ \boxed{\{42\}} }}", "number", False, r"\{42\}"),
        (r"\boxed{12} or $\boxed{13}$", "number", False, "12, 13"),
        (r"\boxed{12}, so \boxed{12}", "number", False, "12"),
        (r"\boxed{}", "number", False, None),
        (r"Answer: \boxed{5} (not 6)", "number", False, "5"),
        (r"<answer>$\boxed{5}$</answer>", "number", False, "5"),
        ("<answer>Answer: 5</answer>", "number", False, "5"),
        ("Final answer: <answer>5</answer>.", "number", False, "5"),
        (r"\fbox{5} since 2 + 3", "number", False, "5"),
        ("12 or 13", "formula", False, "12 or 13"),
        ("so $x^2$ and then $x^3$.", "formula", False, "x^3"),
        (r"it is \[ y \]", "formula", False, "y"),
        ("<think>Answer: 4</think> 5", "number", False, "5"),
        ("4</think>\nAnswer: 5", "number", False, "5"),
        ("<think>4</think>", "text", False, None),
        ("<think> is it 5?", "number", False, None),
        ("Answer: 5 <thinking> or", "text", False, None),
        ("[THINK] 5", "number", False, None),
    ],
)
def test_extract_answer(text, kind, multiline, answer):
    got = answers.extract_answer(text, kind=kind, multiline=multiline)
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
        ("The result is $x^3$", None),
        ("x^3, x^{3}", None),
        (r"2\sqrt{2}", None),
        ("2x", None),
        ("7\u00b2", None),
        ("area 5 cm^2", "5"),
        (r"so \frac{1}{2}.", "1/2"),
        (r"$-\frac{1}{2}$", "-1/2"),
        ("it is \u20137", "-7"),
        ("from $5 to $10 in all", "10"),
        ("12 or 13", None),
    ],
)
def test_last_number(text, number):
    assert answers.last_number(text) == number


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
    assert answers.undecorated(decorated) == plain


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
    assert answers.hedges(answer, gold) == hedging


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("-1,234.50", "-1234.5"),
        (r"1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("1 234 567", "1234567"),
        ("12,34", None),
        (r"\$25.00", "25"),
        ("-$25", "-25"),
        ("$-25$", "-25"),
        ("\u20ac 25", "25"),
        ("25 \u20ac", "25"),
        ("\u22127", "-7"),
        ("\u20137", "-7"),
        ("- 7", "-7"),
        ("3\u20135", None),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac12", "-1/2"),
        (r"1\frac{1}{2}", "3/2"),
        ("1 1/2", "3/2"),
        ("7/2", "7/2"),
        ("1/0", None),
        (r"1.5 \times 10^{3}", "1500"),
        ("1.5e3", "1500"),
        ("1e9999", None),
        ("12 apples", "12"),
        ("12.5 km/h", "25/2"),
        (r"12\text{ cm}^2", "12"),
        ("5kg", "5"),
        (r"90^\circ", "90"),
        ("20 miles per hour.", "20"),
        ("12 thousand", None),
        ("12 or thirteen", None),
        ("12, 13", None),
        (r"12 \text{ or } 13", None),
        (r"12\pi", None),
        ("12x", None),
        ("12 x", None),
        ("3!", None),
        ("2^3", None),
        ("x = 3", "3"),
        ("12 or x = 13", None),
        ("x >= 3", None),
        ("The answer is $12$. I hope so", "12"),
        ("$12$ or $13$", None),
        (r"\text{42}", "42"),
        ("{{42}}", "42"),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_values(answer, value):
    expected = [] if value is None else [fractions.Fraction(value)]
    assert answers.values(answer) == expected


def test_a_percentage_is_two_values():
    for text in ("50%", r"50\%", "50 percent"):
        assert answers.values(text) == [50, fractions.Fraction(1, 2)]


def test_unfinished_thoughts_are_searched_where_that_is_wanted():
    text = r"<think> is it \boxed{5}? Let me check"
    find = functools.partial(answers.extract_answer, text, kind="number")
    assert find() is None
    assert find(unfinished_thoughts=True) == "5"


def test_hostile_texts_take_no_time():
    nested = r"\boxed{" * 3000 + "}" * 3000
    opened = (r"\boxed{", "{", r"\(", r"\[", "$", "<answer>", "Answer:")
    started = time.perf_counter()
    for text in (nested, *(one * 20000 for one in opened)):
        assert not answers.values(answers.extract_answer(text, kind="number") or "")
    assert time.perf_counter() - started < 10
