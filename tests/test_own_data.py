"""What docs/own_data.md shows is so: its commands, its reward, its errors."""

import pathlib
import re
import shlex
import sys

import pytest

from tlt_jax import config, types
from tlt_jax.models.formats import tokenizer
from tlt_jax.rl.tasks import build, prompts, rewards
from tlt_jax.runtime import command_line

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own_data.md").read_text("utf-8")


def test_its_commands_are_settings_that_go_together(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.findall(r"python -m tlt_jax\.main (.*--config.*)", PAGE)
    runs = []
    for line in found:
        line = line.replace("../tlt_jax/", "")
        words, changes = command_line.overrides(["main", *shlex.split(line)])
        recipe = command_line.last_value(words, "config")
        runs.append(command_line.settings_of(recipe, changes, config.RunConfig))
    template, alone, both, thinking, *_ = runs
    assert template.task.name == "mine.jsonl" and not template.reward.functions
    assert alone.task.name == "mine.jsonl" and alone.reward.functions == ("number",)
    assert dict(alone.task.options)["chat"] is True
    assert both.reward.functions == ("number", "my_reward:short")
    assert both.reward.weights == (1.0, 0.2)
    assert thinking.task.template_options == (("enable_thinking", False),)


def test_its_reward_is_one(tmp_path, monkeypatch):
    code = re.search(r"```python\n# (my_reward\.py)\n(.*?)```", PAGE, re.S)
    (tmp_path / code[1]).write_text(code[2])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    judge = rewards.combined(("number", "my_reward:short"), (1.0, 0.2), None)
    verdict = judge(types.Example("e", "2+2?", "4"), "It is 4")
    assert verdict.values == (1.0, pytest.approx(1 / 3))


@pytest.fixture
def provoked(tmp_path, monkeypatch):
    """What is said of mistakes that people make, made here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    files = {
        "unnamed.jsonl": '{"question": "2+2?"}',
        "half.jsonl": r'{"prompt": "a", "answer": "\ud83d"}',
        "unanswered.jsonl": '{"prompt": "a"}',
        "damaged.parquet": "no Parquet",
        "my_reward.py": "def short(example, text): ...\ndef one(text): ...",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    chat = tokenizer.from_alphabet("0123456789+=?")
    chat.chat_template = "{{ enable_thinking }}"
    example = types.Example("e", "1+1=", "2")

    def own(name):
        return lambda: rewards.named(f"my_{name}")

    def prompts_of(limit):
        keep = {"max_tokens": limit, "long_prompts": "refuse"}
        return prompts.PromptSet([example], lambda e: chat.encode(e.prompt), **keep)

    mistakes = [
        lambda: build.FileTask("mine.jsonl"),
        lambda: build.FileTask("unnamed.jsonl"),
        lambda: build.FileTask("half.jsonl"),
        lambda: build.FileTask("unanswered.jsonl", reward="number"),
        lambda: build.FileTask("damaged.parquet"),
        lambda: rewards.named("exakt"),
        lambda: rewards.combined(("exact", "exact"), (), None),
        *map(own, ("reward:shrt", "rewards:short", "reward:one")),
        lambda: chat.render([{"role": "user", "content": "1"}], thinking=True),
        lambda: chat.encode_prompt("1+1=", enable_thinking=True),
        lambda: prompts_of(3),
    ]
    said = []
    for mistake in mistakes:
        with pytest.raises(ValueError) as raised:
            mistake()
        said.append(str(raised.value))
    return said


def test_what_errors_say_is_what_is_said(provoked):
    table = PAGE.partition("## What errors say")[2]
    cells = re.findall(r"^\| (`.*`) \| ", table, re.M)
    messages = [message for cell in cells for message in re.findall("`(.*?)`", cell)]
    assert len(messages) == len(provoked) and "\n" not in "".join(provoked)
    for message in messages:
        pattern = re.escape(message).replace(re.escape("..."), ".*")
        pattern = re.sub(r"\bN\b", r"\\d+", pattern)
        assert any(re.search(pattern, said) for said in provoked), message
