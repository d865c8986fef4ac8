"""The template for data of one's own works as it stands, but for the model."""

import json

from configs import mine
from tlt_jax import config
from tlt_jax.rl.tasks import build as tasks


def test_a_file_is_read_judged_and_held_out_in_part(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = config.load(mine.get_config(str(path)))
    assert run.task.name == str(path)
    task = tasks.build(run.task, reward=run.reward, eval_size=run.eval.num_prompts)
    train, held_out = task.examples("train"), task.examples("eval")
    assert len(train) + len(held_out) == 60 and 2 <= len(held_out) <= 12
    first = train[0]
    assert [message["role"] for message in first.prompt] == ["system", "user"]
    right, wrong = f"Answer: {first.answer}", f"Answer: {first.answer}0"
    assert (task.score(first, right), task.score(first, wrong)) == (1.0, 0.0)


def test_without_a_variant_it_is_mine_jsonl():
    assert config.load(mine.get_config()).task.name == "mine.jsonl"
