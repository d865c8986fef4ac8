"""Chat requests: repeatable, different, and held-out ones about other topics."""

from tlt_jax.rl.tasks import chat


def contents(task, split):
    return [example.prompt[0]["content"] for example in task.examples(split)]


def test_requests_are_a_function_of_the_seed_and_differ():
    task = chat.ChatPrompts(seed=1, size=300, eval_size=50)
    requests = contents(task, "train")
    assert len(set(requests)) == 300
    assert requests == contents(chat.ChatPrompts(seed=1, size=300), "train")
    assert requests != contents(chat.ChatPrompts(seed=2, size=300), "train")
    assert not any("{" in request or "\n" in request for request in requests)


def test_held_out_requests_have_topics_of_their_own():
    task = chat.ChatPrompts(size=2000, eval_size=400)
    train, held_out = set(contents(task, "train")), set(contents(task, "eval"))
    assert not train & held_out
    assert any("bicycles" in request for request in held_out)
    assert not any("bicycles" in request for request in train)
