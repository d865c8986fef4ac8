"""What docs/own_data.md shows is so: its commands, its reward, its errors."""

import pathlib
import re
import shlex

import pytest

from tlt_jax import config, types
from tlt_jax.rl.tasks import rewards
from tlt_jax.runtime import command_line

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own_data.md").read_text("utf-8")
CODE = "".join(
    path.read_text("utf-8") for path in sorted((ROOT / "tlt_jax").rglob("*.py"))
)


def test_its_commands_are_settings_that_go_together(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.findall(r"python -m tlt_jax\.main (.*--config.*)", PAGE)
    runs = []
    for line in found:
        line = line.replace("../tlt_jax/", "")
        words, changes = command_line.overrides(["main", *shlex.split(line)])
        recipe = command_line.last_value(words, "config")
        runs.append(command_line.settings_of(recipe, changes, config.RunConfig))
    assert len(runs) >= 4
    alone, both, thinking, _ = runs[:4]
    assert alone.task.name == "mine.jsonl" and alone.reward.functions == ("number",)
    assert dict(alone.task.options)["chat"] is True
    assert both.reward.functions == ("number", "my_reward:short")
    assert both.reward.weights == (1.0, 0.2)
    assert thinking.task.template_options == (("enable_thinking", False),)


def test_its_reward_is_one(tmp_path, monkeypatch):
    code = re.search(r"```python\n# (my_reward\.py)\n(.*?)```", PAGE, re.S)
    (tmp_path / code[1]).write_text(code[2])
    monkeypatch.syspath_prepend(tmp_path)
    judge = rewards.combined(("number", "my_reward:short"), (1.0, 0.2), None)
    verdict = judge(types.Example("e", "2+2?", "4"), "It is 4")
    assert verdict.values == (1.0, pytest.approx(1 / 3))


def test_what_errors_say_is_what_the_code_says():
    table = PAGE.partition("## What errors say")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| (`.*?`) \|", table, re.M)
    assert len(messages) > 10
    for message in re.findall(r"`(.*?)`", "".join(messages)):
        # Between what varies: dots, numbers, names in quotes, what follows a colon.
        for part in re.split(r"\.\.\.|\bN\b|'[^']*'|\(.*?\)|U\+\w+", message):
            words = [w for w in re.findall(r"[A-Za-z]{3,} [a-z ]{3,}", part)]
            for text in words:
                first = " ".join(text.split()[:3])
                assert first in re.sub(r'"\s+f?"', "", CODE), first
