"""The checker names bad lines with their remedy, and its status says so."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from tlt_jax import check_data
from tlt_jax.models.formats import tokenizer

GOOD = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": 4}]


@pytest.fixture
def check(capsys):
    """Runs the command in this process; returns status and output."""

    def call(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            with pytest.raises(SystemExit) as ended:
                check_data.main(flags.FLAGS(["check_data", *map(str, arguments)]))
        out, errors = capsys.readouterr()
        return ended.value.code, out + errors

    was_parsed = flags.FLAGS.is_parsed()
    yield call
    if was_parsed:
        flags.FLAGS.mark_as_parsed()
    else:
        flags.FLAGS.unparse_flags()


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_good_data_is_counted(check, tmp_path):
    first = write(tmp_path / "a.jsonl", GOOD)
    second = write(tmp_path / "b.jsonl", [{"prompt": "x"}])
    status, out = check(first, second)
    assert status == 0
    assert f"{first}: 2 rows, 2 with an answer, 0 bad\n" in out
    assert f"{second}: 1 rows, 0 with an answer, 0 bad\n" in out


def test_every_bad_line_is_named_with_its_remedy(check, tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        [*GOOD, '{"prompt": ', {"question": "?"}, {"prompt": "ok", "id": 1}]
        + [{"prompt": "again", "id": 1}],
    )
    status, out = check(path, write(tmp_path / "y.jsonl", GOOD))
    assert status == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"{path}, line 3: came ")
    assert "accepted is one JSON object a line" in lines[0]
    assert f"{path}, line 4: no 'prompt' among the columns question" in lines[1]
    assert "the id '1' is that of line 5, too: ids must be distinct" in lines[2]
    assert lines[3] == f"{path}: 6 rows, 2 with an answer, 3 bad"
    assert lines[4].endswith("2 rows, 2 with an answer, 0 bad")
    status, out = check("--shown=1", path)
    assert status == 1 and "3 bad (1 shown)" in out and len(out.splitlines()) == 2


def test_answers_that_no_text_could_match(check, tmp_path):
    path = write(tmp_path / "x.jsonl", [*GOOD, {"prompt": "3?"}])
    status, out = check("--reward=number", path)
    assert status == 1 and "line 3: no answer, which the reward number" in out
    path = write(tmp_path / "x.jsonl", [*GOOD, {"prompt": "3?", "answer": "three"}])
    assert check("--reward=exact", path)[0] == 0
    status, out = check("--reward=number", path)
    assert status == 1
    assert "line 3: the reference answer 'three' is not a number: use the" in out
    path = write(tmp_path / "x.jsonl", [{"prompt": "3?", "answer": "3} or 4"}])
    status, out = check("--reward=math_verify", path)
    assert status == 1 and "does not take the answer '3} or 4' for right itself" in out
    # Of two solutions both are the answer, and one is none.
    path = write(tmp_path / "x.jsonl", [{"prompt": "3?", "answer": "3 or 4"}])
    assert check("--reward=math_verify", path)[0] == 0
    status, out = check("--reward=nmber", path)
    assert status == 2 and "math_verify, exact or number" in out


def test_prompts_that_are_too_long(check, tmp_path, monkeypatch):
    made = tokenizer.from_alphabet("0123456789+=?")

    class Source:
        def tokenizer(self):
            return made

    monkeypatch.setattr(check_data.source, "resolve", lambda spec: Source())
    path = write(tmp_path / "x.jsonl", [*GOOD, {"prompt": "1+1+1+1?"}])
    limit = "--max_prompt_tokens=6"
    status, out = check("--tokenizer_of=some", limit, path)
    assert status == 1 and "line 3: the prompt has " in out
    assert "more than 6: shorten it, raise task.max_prompt_tokens" in out
    assert out.splitlines()[-1].endswith("1 bad")
    made.chat_template = "{% for m in messages %}+{{ m.content }}=?{% endfor %}"
    status, out = check("--as_chat", "--tokenizer_of=some", limit, path)
    assert status == 1 and "line 1: the prompt has 7 tokens, more than 6" in out
    status, out = check(limit, path)
    assert status == 2 and "belong together" in out


def test_half_a_character_is_a_bad_row(check, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' + r'{"prompt": "a", "answer": "\ud83d"}' + "\n")
    status, out = check(path)
    assert status == 1
    assert f"{path}, line 2: answer holds half a character (U+D83D): text is" in out
    assert out.splitlines()[-1].endswith("2 rows, 0 with an answer, 1 bad")


def test_files_that_are_not_there(check, tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD)
    status, out = check(tmp_path / "none.jsonl", path)
    assert status == 2 and "0 bad" in out
    assert f"error: {tmp_path / 'none.jsonl'} is not a file" in out
    (tmp_path / "empty.jsonl").write_text("")
    status, out = check(tmp_path / "empty.jsonl")
    assert status == 1 and "0 bad: it is empty" in out
    status, out = check()
    assert status == 2 and "name at least one data set" in out
