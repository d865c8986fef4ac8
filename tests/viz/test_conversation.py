"""Lines are answered, and what was said is kept."""

import io
import os
import signal

import pytest

from tlt_jax.viz import conversation


def converse(lines, answer, **options):
    """Converse; return the messages, and what was shown."""
    rest, file = iter(lines), io.StringIO()

    def read(prompt):
        assert prompt == "> "
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    said = conversation.converse(answer, read=read, file=file, **options)
    return said, file.getvalue()


def echo(messages, show):
    """Says how many messages it was given, and the last one."""
    for piece in (f"{len(messages)} ", messages[-1]["content"]):
        show(piece)
    return f"{len(messages)} {messages[-1]['content']}"


def contents(messages):
    return [message["content"] for message in messages]


def test_what_was_said_is_kept_until_the_lines_end():
    said, shown = converse(["a", "", "b"], echo, system="be kind")
    assert contents(said) == ["be kind", "a", "2 a", "b", "4 b"]
    roles = [message["role"] for message in said]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert shown == "2 a\n4 b\n"


def test_exit_ends_it_and_clear_begins_anew():
    said, shown = converse(["a", "/clear", "b", "/exit", "c"], echo, system="s")
    assert contents(said) == ["s", "b", "2 b"]
    assert shown == "2 a\n2 b\n"
    # A line that was interrupted is dropped.
    assert contents(converse([KeyboardInterrupt, "b"], echo)[0]) == ["b", "1 b"]


def test_an_interrupted_answer_stays_as_far_as_it_came():
    def answer(messages, show):
        show("one")
        if len(messages) == 1:
            raise conversation.Interrupted
        return "one"

    said, shown = converse(["a", "b"], answer)
    assert contents(said) == ["a", "one", "b", "one"]
    assert shown == "one [interrupted]\none\n"


def test_a_question_that_cannot_be_answered_is_forgotten():
    def answer(messages, show):
        if messages[-1]["content"] == "long":
            raise ValueError("too long.")
        return echo(messages, show)

    said, shown = converse(["long", "b"], answer)
    assert contents(said) == ["b", "1 b"]
    assert shown == "[too long.]\n1 b\n"


def test_ctrl_c_is_seen_where_it_is_looked_for():
    before = signal.getsignal(signal.SIGINT)
    with conversation.interruptible() as check:
        check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(conversation.Interrupted):
            check()
        # A second one ends the program as ever.
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
