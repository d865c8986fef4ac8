"""Chat templates from strangers: whatever they compute is a line, soon."""

import pytest

from tlt_jax.foreign import process
from tlt_jax.models.formats import chat_template

MESSAGES = {"messages": [{"role": "user", "content": "1 < 3 \u00e9"}]}
DOUBLING = (
    "{% set n = namespace(x='ab') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1/0 }}", "refuses the messages: ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a'*10**10 }}", "refuses the messages: MemoryError: mend"),
        ("{{ 'a'.center(10**10) }}", "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "MemoryError"),
        (DOUBLING, "MemoryError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'a' * 5000000 }}", "makes a text of 5000000 characters"),
        ("{{ x.y.z }}", "refuses the messages: 'x' is undefined"),
        ("{{ raise_exception('a\nb') }}", r"refuses the messages: a\\nb: mend"),
        ("{% if 1 %}" * 2000, "cannot be read"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be read: RecursionE"),
        ("{% for %}", "cannot be read: Expected an expression"),
    ],
)
def test_what_a_template_does_is_one_line(source, message):
    with pytest.raises(ValueError, match=f"the chat template .*{message}") as caught:
        chat_template.render(source, MESSAGES)
    assert "\n" not in str(caught.value)
    # The next one is none the worse.
    assert (
        chat_template.render("{{ messages[0].content }}!", MESSAGES) == "1 < 3 \u00e9!"
    )


def test_what_ends_or_fills_time_costs_that_text_only(monkeypatch):
    monkeypatch.setattr(chat_template, "_LIMITS", process.Limits(0.3, 1 << 28))
    renderer, lock = chat_template._renderer.__wrapped__()
    monkeypatch.setattr(chat_template, "_renderer", lambda: (renderer, lock))
    slow = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="takes more than 0.3 s: mend"):
        chat_template.render(slow, MESSAGES)
    with pytest.raises(ValueError, match=r"ends its process \(it wrote"):
        chat_template.render(
            "{{ 'a' * 100000 }}", MESSAGES
        )  # Beyond the answer's limit.
    assert chat_template.render("{{ 1 + 1 }}", {}) == "2"
    renderer.close()


def test_variables_that_a_template_reads():
    source = "{% set a = 1 %}{{ a }}{{ y }}{% for m in messages %}{{ x }}{% endfor %}"
    assert chat_template.undeclared(source) == ["messages", "x", "y"]
    assert chat_template.undeclared("{{ range(2) }}{{ strftime_now('%d') }}") == []
