"""Prompts are encoded as the task's settings say."""

import pytest

from tlt_jax import assembly, types
from tlt_jax.models.formats import tokenizer
from tlt_jax.settings import sections


class Task:
    name = "sums"

    def examples(self, split):
        prompt = (
            {"role": "user", "content": {"train": "1+1=", "eval": "2+2="}[split]},
        )
        return [types.Example(split, prompt, None)]


def test_template_options_reach_every_prompt():
    made = tokenizer.from_alphabet("0123456789+=?")
    made.chat_template = "{{ messages[0].content }}{{ '?' if thinking else '' }}"

    def prompt(split, **options):
        cfg = sections.Task(template_options=tuple(options.items()))
        found = assembly.prompts_of(cfg, Task(), split, made, None)
        return made.decode(found.prompts[0].tokens)

    assert prompt("train") == prompt("train", thinking=False) == "1+1="
    assert prompt("train", thinking=True) == "1+1=?"
    assert prompt("eval", thinking=True) == "2+2=?"
    with pytest.raises(ValueError, match="knows no option 'thinkin', .* it has think"):
        prompt("train", thinkin=True)
