"""What of records can be shown, and that the rest ends no report."""

import json
import math

from tlt_jax.viz import readable, timeline

WHOLE = {
    "text": "ab",
    "finish_reason": "eos",
    "num_tokens": 2,
    "reward": 1.0,
    "answer": None,
    "prompt": [{"role": "user", "content": "?"}],
    "tokens": [3, 4],
    "drafted": [[0, 1], [1, 2]],
}


def test_values_have_the_types_that_are_drawn():
    row = {
        "step": 3,
        "reward/mean": math.nan,
        "length/max": 10**40,
        "specdec/strategy": "D1",
        "policy/kl": "x",
        "policy/entropy": True,
        "specdec/num_accepted": [3, 1],
        "drafter/loss": [1, None],
    }
    (shown,) = readable.rows([row])
    assert (
        list(shown) == "step reward/mean specdec/strategy specdec/num_accepted".split()
    )
    assert readable.number({"a": [1]}, "a") is readable.number({}, "a") is None
    assert readable.numbers(row, "specdec/num_accepted") == [3, 1]
    assert readable.numbers({"a": [math.inf]}, "a") == []


def test_completions_that_say_nothing_are_counted(tmp_path):
    wrong = (
        *({"num_tokens": -1}, {"num_tokens": True}, {"reward": math.nan}),
        *({"drafted": [[1, 2], [0, 1]]}, {"drafted": [[0, 3]]}, {"drafted": [0]}),
        *({"tokens": ["a"]}, {"tokens": [2**40]}, {"text": None}, {"prompt": [1]}),
        *({"answer": 3}, {"finish_reason": 1}, {"prompt": [{"role": "user"}]}),
    )
    lines = [json.dumps(WHOLE | one) for one in ({}, *wrong)]
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes("\n".join([*lines, "{", "[]"]).encode() + b"\n\xff\n")
    records, num_left_out = readable.completions(path)
    assert records == [WHOLE] and num_left_out == len(wrong) + 3


def test_a_timeline_of_whole_steps(tmp_path):
    def of(step, *intervals):
        workers = [{"worker": 0, "intervals": list(intervals)}]
        return {"step": step, "workers": workers}

    whole = of(1, ["busy", 0.0, 2.0])
    wrong = [
        *(of("1"), of(-1), of(1, ["busy", 2.0, 1.0]), of(1, ["busy", 0.0])),
        *(of(1, ["busy", 0, math.inf]), of(1, [1, 0, 1]), {"step": 1}, [], 3),
    ]
    lines = [json.dumps(one) for one in [*wrong, whole, *wrong]]
    (tmp_path / timeline.FILE).write_text("\n".join(lines) + "\n{")
    assert timeline.read(tmp_path) == [whole]
