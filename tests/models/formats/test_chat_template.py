"""Chat templates are rendered, and those that would hold up a run are refused."""

import os

import pytest

from tlt_jax.models.formats import chat_template

MESSAGES = [{"role": "user", "content": "é\n<b>"}]


DOUBLING = (
    "{% set n = namespace(x='ab') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


def render(source, **variables):
    return chat_template.render(source, {"messages": MESSAGES} | variables)


def test_text_and_names_of_the_hub():
    source = (
        "{% for m in messages %}\n"
        "{% generation %}{{ bos_token }}{{ m.content }}{% endgeneration %}\n"
        "{% if loop.first %}{% continue %}{% endif %}no\n"
        "{% endfor %}\n"
        "{{ messages | tojson }} {{ strftime_now('%%') }} {{ thinking is defined }}"
    )
    expected = 'é\n<b>[{"role": "user", "content": "é\\n<b>"}] % False'
    assert render(source, bos_token="<s>") == "<s>" + expected


@pytest.mark.parametrize(
    "source,reason",
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ raise_exception('no\nsystem') }}", "refuses the messages: no system."),
        ("{{ 'a' * 10**10 }}", "more memory than it may have"),
        ("{{ 'a'|center(10**7) }}", "its text has 10000000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'a'.center(10**10) }}", "more memory than it may have"),
        ("{{ '%10000000000d' % 1 }}", "more memory than it may have"),
        (DOUBLING, "more memory than it may have"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ x.y.z }}", "'x' is undefined. Mend the messages or the template"),
        ("{% if 1 %}" * 2000, "refuses the messages: "),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("{{ raise_exception('\ud83d') }}", "ud83d"),
    ],
)
def test_what_cannot_be_rendered_is_one_line(source, reason):
    with pytest.raises(ValueError, match="the chat template refuses") as caught:
        render(source)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    # The next one is rendered all the same.
    assert render("{{ messages[0].role }}") == "user"


def test_one_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(chat_template, "LIMIT_S", 0.3)
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(ValueError, match="it takes more than 0.3 s"):
        render(endless)
    monkeypatch.undo()
    assert render("x") == "x"


def test_a_fork_has_a_process_of_its_own():
    assert render("x") == "x"
    first, _ = chat_template._renderer(os.getpid(), chat_template.LIMIT_S)
    assert chat_template._renderer(0, chat_template.LIMIT_S)[0] is not first


def test_variables_that_a_template_reads():
    source = "{% set a = 1 %}{{ a }}{{ y }}{% for m in messages %}{{ x }}{% endfor %}"
    assert chat_template.variables(source) == {"messages", "x", "y"}
    assert chat_template.variables("{{ range(2) }}{{ strftime_now('%d') }}") == set()
    with pytest.raises(ValueError, match="cannot be read: RecursionError"):
        chat_template.variables("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")
