"""Chat templates are rendered, and those that would hold up a run are refused."""

import pytest

from tlt_jax.models.formats import chat_template

MESSAGES = [{"role": "user", "content": "é\n<b>"}]


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
