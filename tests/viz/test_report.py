"""The report: one file, nothing loaded, everything escaped, drafted tokens marked."""

import json
import re
import shutil

import pytest

from tests.viz import test_plots
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.viz import page as page_lib
from tlt_jax.viz import report
from tlt_jax.workdir import metrics

ODD = "<script>alert('&')</script>"


def record(index, reward, tokens, drafted, **more):
    return {
        "example_id": f"e{index}",
        "request_id": index,
        "reward": reward,
        "num_tokens": len(tokens),
        "finish_reason": "eos",
        "prompt": "1+1=",
        "answer": "2",
        "text": "?",
        "tokens": tokens,
        "drafted": drafted,
    } | more


@pytest.fixture(scope="module")
def letters():
    return model_tokenizer.from_alphabet("0123456789=+")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, letters):
    directory = tmp_path_factory.mktemp("run <b>")
    more = {
        "rollout/tokens": 50,
        "specdec/num_accepted": [10, 8, 2],
        "specdec/accept_length": 2.0,
        "workers/idle_s": 4.0,
        "workers/trained_s": 3.0,
        "specdec/strategy": ODD,
    }
    test_plots.write(directory, [test_plots.make_row(s, **more) for s in range(3)])
    letters.save(directory / "tokenizer")
    folder = directory / "rollouts"
    folder.mkdir()
    (folder / "step_000001.jsonl").write_text(json.dumps(record(9, 0, [], [])) + "\n")
    ids = letters.encode("12+3").tolist()
    records = [record(i, i % 3, ids[: 1 + i % 3], [[0, 1]]) for i in range(12)]
    records[5] |= {"prompt": [{"role": "user", "content": ODD}], "reward": 9}
    records[7] |= {"tokens": ids, "num_tokens": 4, "drafted": [[1, 3]]}
    lines = [json.dumps(one) + "\n" for one in records]
    (folder / "step_000002.jsonl").write_text("".join(lines))
    (directory / "config.json").write_text(json.dumps({"seed": ODD, "num_steps": 3}))
    return directory


def test_one_file_that_loads_nothing(workdir, tmp_path):
    path = report.write(workdir, tmp_path / "r.html")
    page = path.read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"' )>]{0,12})", page)
    assert sources and set(sources) == {"data:image/p"}
    assert "default-src 'none'" in page and "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") >= 3
    assert "run &lt;b&gt;" in page and "<b>0" in page
    names = re.findall(r'<img alt="(\w+)"', page)
    assert names == ["reward", "lengths", "time_split", "accept_length", "policy"]
    assert report.write(workdir).name == report.FILE


def test_summary_adds_up_what_was_recorded(workdir):
    told = report.summary(metrics.read(workdir))
    assert told["reward, first step"] == "0.000" and told["reward, last 1"] == "0.200"
    assert told["tokens drawn"] == "150"
    assert told["a step, median, without compiling"] == "10 s"
    assert told["accept length"] == "2.00"
    assert told["of the workers' idle time, trained"] == "75%"


def test_answers_are_the_longest_then_best_to_worst(workdir):
    step, answers, num_unread = report.sample_answers(workdir, 4)
    assert (step, num_unread) == (2, 0)
    assert answers[0].about == "the longest, 4 tokens, ended by eos, 2 drafted"
    assert [text for text, drafted in answers[0].pieces if drafted] == ["2+"]
    assert [one.reward for one in answers[1:]] == [9, 1, 0]
    assert answers[1].prompt == f"user: {ODD}"
    assert report.sample_answers(workdir, 0) == (0, [], 0)
    shown = page_lib.answer(answers[0])
    assert "1<mark>2+</mark>3" in shown


def test_what_cannot_be_read_is_left_out_and_counted(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    folder = tmp_path / "run" / "rollouts"
    (folder / "step_000004.jsonl").write_text("")
    half = json.dumps(record(1, 0.5, [1], None))[:40]
    (folder / "step_000003.jsonl").write_text(half)
    (folder / "step_000005.part").write_text(half)
    step, answers, num_unread = report.sample_answers(tmp_path / "run", 4)
    assert (step, len(answers), num_unread) == (2, 4, 2)
    page = report.write(tmp_path / "run").read_text("utf-8")
    assert "Answers of step 2" in page
    assert "Lines of rollouts/ that cannot be read: 2." in page
    shown = report._table([{"step": 1, "specdec/accept_length": 1.0}])[0]
    assert shown == ["step"]


def test_a_chain_rule_is_named_and_promises_no_text(workdir, tmp_path):
    keyed = report.page(workdir, 4)
    assert "Without drafts the text would be the same." in keyed
    shutil.copytree(workdir, tmp_path / "run")
    assert "rule" not in report._table(metrics.read(workdir))[0]
    record = tmp_path / "run" / metrics.FILE
    said = '{"specdec/rule": "block", '
    record.write_text(record.read_text().replace("{", said))
    rows = metrics.read(tmp_path / "run")
    page = report.page(tmp_path / "run", 4)
    assert "Without drafts the text would be another one of the same law." in page
    assert "would be the same" not in page
    assert report.summary(rows)["accept length, by the rule block"] == "2.00"
    names, cells = report._table(rows)
    assert {line[names.index("rule")] for line in cells} == {"block"}


def test_characters_are_not_torn():
    class Bytes:
        def token_bytes(self, token):
            return bytes([token])

    tokens = list("aé≈".encode()) + [0xE2]
    cut = report.pieces(record(0, 1, tokens, [[0, 2], [4, 5]]), Bytes())
    assert cut == [("a", True), ("é", False), ("≈", False), ("�", False)]
    old = record(0, 1, tokens, None)
    assert report.pieces(old, Bytes()) == [("?", False)]


def test_what_has_no_record_is_refused(tmp_path):
    with pytest.raises(metrics.MetricsError, match="does not exist: give"):
        report.write(tmp_path)
    (tmp_path / metrics.FILE).write_text("")
    with pytest.raises(metrics.MetricsError, match="has no step yet: wait"):
        report.write(tmp_path)
