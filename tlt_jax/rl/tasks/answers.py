r"""The final answer of a completion: where it stands, and which number it is.

All verifiers take it from here. It is what follows the last `Answer:`; else what the
last `<answer>` tag encloses; else the last balanced `\boxed{}`; else, where nothing is
marked, the last formula or number that stands alone. Thoughts (`<think>`) are none of
it. Candidates side by side ("12 or 13") stay side by side, so that they equal nothing.
"""

import fractions
import re
from collections.abc import Iterator
from typing import Literal

from tlt_jax import types

Kind = Literal["text", "formula", "number"]

# Key of an example's metadata: its prompt ends within a thought, as some templates do.
IN_THOUGHT = "in_thought"

_THOUGHT = re.compile(r"[<\[](/?)(?:think(?:ing)?|thoughts?|reasoning)[>\]]", re.I)
# "Answer: 7", "**Final answer:** 7", "ANSWER : 7".
_MARKER = re.compile(r"\banswer[*_ \t]*:[*_]*", re.IGNORECASE)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
# What may stand between two candidates.
_BETWEEN = re.compile(
    r"[\s$,;()]*(?:\\(?:text|mathrm)\s*\{\s*)?(?:(?:or|and)\b)?[\s$,;()}]*"
)
# Dashes that are written for a minus; the longer ones are punctuation.
_MINUS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
_SIGN = rf"[-+{_MINUS}]"
# A minus belongs to the number unless it subtracts ("7-5"), a digit does unless it is
# part of a word ("H2O"). Thousands may be parted by commas. Exponents are short: exact
# arithmetic with 1e999999999 would never end.
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![\w)\]]){_SIGN})?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
    r"(?:\.\d+(?:[eE][-+]?\d{1,3})?|/\d+|[eE][-+]?\d{1,3})?"
    rf"|(?<![\w.])(?:(?<![\w)\]]){_SIGN})?\.\d+"
)
_FRACTION = (
    r"\\[cdt]?frac\s*(?:\{\s*(?P<over>[-+]?\d+)\s*\}|(?P<over1>\d))"
    r"\s*(?:\{\s*(?P<under>\d+)\s*\}|(?P<under1>\d))"
)
_LATEX_FRACTION = re.compile(rf"(?<![\w.])(?:(?<![\w)\]]){_SIGN})?\d*\s*{_FRACTION}")
# Money ("$5 and $7") is no formula: it would end before a blank, or a digit follows.
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(?=\S)([^$]*[^\s\\$])\$(?!\d)"
    r"|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]",
    re.DOTALL,
)
# One number as people write it, and what follows it.
_WRITTEN = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?:\\?[$\u00a3\u20ac\u00a5])\s*)?(?P<sign1>[-+]?)\s*"
    rf"(?:(?P<whole>\d+)?\s*{_FRACTION}"
    r"|(?:(?P<mixed>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    r"|(?P<decimal>(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<e>[-+]?\d{1,3})(?!\d)"
    r"|\s*(?:\\times|\\cdot|[x\u00d7*])\s*10\s*\^\s*"
    r"(?:\{\s*(?P<e1>[-+]?\d{1,3})\s*\}|(?P<e2>[-+]?\d{1,3})(?!\d)))?)"
    r"(?P<rest>.*)",
    re.DOTALL,
)
_PERCENT = re.compile(r"\s*\\?%|\s+per\s?cent", re.IGNORECASE)
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\u00b0)\s*[CF]?")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_POWER = r"(?:\^(?:\{-?\d\}|-?\d)|[\u00b2\u00b3])?"
_UNIT = re.compile(
    rf"(?:[\s/]+[^\W\d_]+{_POWER}\.?){{1,4}}\s*"
    r"|\s*[$\u00a3\u20ac\u00a5]"
    rf"|(?:[kcm]?[mg]|m?[lL]|m?s|k?[WVN]|k?Hz|h|min|lb|ft){_POWER}"
)
_LETTERS = frozenset("mgshlLWVAKCFJN")
_NO_UNIT = frozenset(
    "or and not to but nor if maybe perhaps plus minus times over more less than "
    "hundred thousand million billion trillion dozen half squared cubed factorial pi "
    "ten twenty one two three four five six seven eight nine".split()
)
# What follows a number that is a part of something else.
_FACTOR = re.compile(
    r"[\^}\u00b2\u00b3]|\\(?!text|mathrm|mbox)[A-Za-z]|"
    rf"(?![{''.join(sorted(_LETTERS))}])[A-Za-z]\b"
)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?"
    r"(?:answer|result)\s+(?:is|=)\s*",
    re.IGNORECASE,
)


def extract_answer(
    text: str,
    *,
    kind: Kind = "text",
    multiline: bool = False,
    unfinished_thoughts: bool = False,
) -> str | None:
    r"""Finds the final answer in a completion.

    It is what follows the last `Answer:` (letter case and emphasis do not matter); if
    there is none, what the last `<answer>` tag encloses; of these what they box, if
    they do. If there is neither, the last balanced `\boxed{}`; if there is none, the
    last number of a numeric answer, the last formula or number of a formula, else the
    whole text. A mark that nothing follows is no answer, whatever came before it.

    Args:
      text: the completion.
      kind: what the answer is.
      multiline: the answer has several lines: all that follows `Answer:` is taken
        instead of the first line that is not blank.
      unfinished_thoughts: thoughts that do not end are searched for the answer, too;
        else they hold none.

    Returns:
      The answer without surrounding blanks, or None.
    """
    *_, thought = [None, *_THOUGHT.finditer(text)]
    if thought is not None and thought[1]:
        text = text[thought.end() :]
    elif thought is not None and not unfinished_thoughts:
        return None
    markers, tags = list(_MARKER.finditer(text)), _TAG.findall(text)
    if markers or tags:
        answer = text[markers[-1].end() :].strip() if markers else tags[-1].strip()
        if markers and not multiline:
            answer = answer.partition("\n")[0].strip()
        # One mark within the other is the same answer.
        *_, inner = [answer, *_TAG.findall(answer)]
        answer = re.sub(r"</?answer>", "", inner, flags=re.IGNORECASE).strip()
        return _boxed(answer) or answer or None
    boxed = _boxed(text)
    if boxed is not None:
        return boxed or None
    if kind == "text":
        return text.strip() or None
    return last_number(text) if kind == "number" else last_formula(text)


def opens_thought(prompt: str) -> bool:
    """Tells whether a prompt ends with the tag that opens a thought."""
    *_, thought = [None, *_THOUGHT.finditer(prompt)]
    return bool(thought and not thought[1] and not prompt[thought.end() :].strip())


def turn(example: types.Example, text: str) -> str:
    """Returns a completion behind what the prompt has already begun of it."""
    return f"<think>{text}" if example.metadata.get(IN_THOUGHT) else text


def _boxed(text: str) -> str | None:
    r"""Returns what the last balanced `\boxed{}` holds, and those beside it; or None.

    Of boxes within each other it is the outer one, without the inner ones' marks.
    """
    opened: list[tuple[bool, int, int]] = []
    found: list[tuple[int, int, int]] = []
    for match in _BRACE.finditer(text):
        if match[1] or match[0] == "{":
            opened.append((bool(match[1]), match.start(), match.end()))
        elif match[0] == "}" and opened:
            is_box, start, inner = opened.pop()
            if is_box:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, inner, match.end()))
    if not found:
        return None
    together, next_start = [], found[-1][2]
    for start, inner, end in reversed(found):
        if not _BETWEEN.fullmatch(text, end, next_start):
            break
        content = re.sub(
            r"\\(?:boxed|fbox)\s*(?:\{([^{}]*)\})?", r"\1", text[inner : end - 1]
        )
        together.insert(0, _unbraced(content.strip()))
        next_start = start
    return ", ".join(dict.fromkeys(together))


def _unbraced(text: str) -> str:
    """Removes braces around the whole of `text`."""
    while re.match(r"\{[^}]*\{|\{[^{}]*\}$", text) and text.endswith("}"):
        text = text[1:-1].strip()
    return text


def is_balanced(text: str) -> bool:
    """Tells whether every brace has its other one."""
    depth = 0
    for match in _BRACE.finditer(text):
        depth += (match[0][-1] == "{" and len(match[0]) != 2) - (match[0] == "}")
        if depth < 0:
            return False
    return not depth


def undecorated(answer: str) -> str:
    r"""Removes what surrounds an answer without changing it.

    That is emphasis, quotes, `$`, `\( \)`, `\boxed{}` and the sentence's full stop.
    """
    previous = None
    while previous != answer:
        previous = answer
        answer = answer.strip(" \t\n*`$\"'").removesuffix(".")
        answer = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", answer, flags=re.DOTALL)
        answer = re.sub(r"^\\boxed\{([^{}]*)\}$", r"\1", answer)
    return answer


def hedges(answer: str, gold: str) -> bool:
    """Tells whether an answer contains the right one among other words or numbers.

    Punctuation around it is none, and a single number (5.0 for 5) is no hedge either.
    """
    bare = undecorated(gold) or gold
    if answer == gold or bare not in answer or is_number(answer):
        return False
    return any(c.isalnum() for c in answer.replace(bare, "", 1))


def last_formula(text: str) -> str | None:
    """Returns the last formula (between `$`, say) or number that stands alone, or None.

    With another one beside it ("12 or 13") it is both.
    """
    items = list(_items(text))
    if not items:
        return None
    start, end, found = items[-1]
    for first, last, before in reversed(items[:-1]):
        between = text[last:start].strip(" $").lower()
        if between != "or":
            break
        start, found = first, f"{before} or {found}"
    return found


def last_number(text: str) -> str | None:
    """Returns the last number in `text` in plain form (`-1234`, `3/4`), or None.

    A number of a formula that is more than this number does not stand alone, nor does
    an exponent; nor one of several candidates.
    """
    found = last_formula(text)
    if found is None:
        return None
    if _NUMBER.fullmatch(found):
        return plain(found)
    value = values(found)
    return str(value[0]) if value else None


def _items(text: str) -> Iterator[tuple[int, int, str]]:
    """Yields formulas, and numbers outside of them: start, end, content."""
    at = 0
    for match in [*_FORMULA.finditer(text), None]:
        end = len(text) if match is None else match.start()
        fractions_ = list(_LATEX_FRACTION.finditer(text, at, end))
        numbers = [
            one
            for one in _NUMBER.finditer(text, at, end)
            if _stands_alone(text, one)
            and not any(f.start() <= one.start() < f.end() for f in fractions_)
        ]
        for one in sorted([*fractions_, *numbers], key=lambda one: one.start()):
            yield one.start(), one.end(), one[0]
        if match is not None:
            content = next(group for group in match.groups() if group is not None)
            yield match.start(), match.end(), content.strip()
            at = match.end()


def _stands_alone(text: str, number: re.Match) -> bool:
    r"""Tells numbers from exponents, arguments (`\sqrt{2}`), factors and bases."""
    before = text[max(number.start() - 9, 0) : number.start()]
    return (
        not before.endswith("{")
        and not before.rstrip(" {").endswith("^")
        and not _FACTOR.match(text, number.end())
    )


def is_number(text: str) -> bool:
    """Tells whether the whole of `text` is one number."""
    return bool(_NUMBER.fullmatch(text.strip()))


def plain(text: str) -> str:
    """Writes numbers with ASCII signs and without commas."""
    return with_ascii_minus(text).replace(",", "")


def with_ascii_minus(text: str) -> str:
    """Replaces dashes that are written for a minus by one."""
    return re.sub(f"[{_MINUS}]", "-", text)


def alone(answer: str) -> str:
    """Removes what introduces an answer ("The answer is"), and a formula's marks.

    Of an answer with one formula and no other number it is this formula.
    """
    answer = _LEAD.sub("", undecorated(answer), count=1)
    found = list(_FORMULA.finditer(answer))
    if len(found) == 1:
        around = answer[: found[0].start()] + " " + answer[found[0].end() :]
        words = re.findall(r"[a-z]+", around.lower())
        if not re.search(r"\d", around) and not _NO_UNIT.intersection(words):
            return next(group for group in found[0].groups() if group is not None)
    answer = re.sub(r"(?<!\\)\$|\\[()\[\]]", " ", answer)
    return undecorated(answer)


def values(answer: str) -> list[fractions.Fraction]:
    r"""Reads an answer that is one number, exactly.

    Read are fractions (also `\frac{1}{2}` and `1 1/2`), decimals, powers of ten,
    thousands, signs of all kinds, currencies and units; of an equation its right side.

    Returns:
      The number; of a percentage also its hundredth; nothing if it is no number, or
      several.
    """
    before, _, text = with_ascii_minus(alone(answer)).rpartition("=")
    if re.search(r"[<>!:]$|\bor\b", before):
        return []
    text = re.sub(r"\\[,;:! ]|[\u00a0\u2009\u202f~]", " ", text.replace("{,}", ","))
    text = re.sub(r"\\left|\\right|\\displaystyle", "", text).strip()
    text = _unbraced(_TEXT.sub(r"\1", text) if _TEXT.fullmatch(text) else text)
    match = _WRITTEN.fullmatch(text)
    if match is None or not _is_unit(match["rest"]):
        return []
    try:
        value = _value(match)
    except (ValueError, ZeroDivisionError):  # Thousands of digits, or x/0.
        return []
    if _PERCENT.fullmatch(match["rest"]):
        return [value, value / 100]
    return [value]


def _is_unit(rest: str) -> bool:
    """Tells whether what follows a number leaves it as it is."""
    if not rest.strip() or _PERCENT.fullmatch(rest) or _DEGREES.fullmatch(rest):
        return True
    rest = _TEXT.sub(r" \1", rest)
    words = re.findall(r"[^\W\d_]+", rest)
    return (
        bool(_UNIT.fullmatch(rest.rstrip()))
        and not _NO_UNIT.intersection(word.lower() for word in words)
        and all(len(word) > 1 or word in _LETTERS for word in words)
    )


def _value(match: re.Match) -> fractions.Fraction:
    if match["decimal"]:
        exponent = match["e"] or match["e1"] or match["e2"] or "0"
        digits = re.sub(r"[, ]", "", match["decimal"])
        value = fractions.Fraction(digits) * fractions.Fraction(10) ** int(exponent)
    else:
        over = match["over"] or match["over1"] or match["top"]
        under = match["under"] or match["under1"] or match["bottom"]
        value = fractions.Fraction(int(over), int(under))
        value += int(match["whole"] or match["mixed"] or 0)
    negative = (match["sign"] == "-") != (match["sign1"] == "-")
    return -value if negative else value
