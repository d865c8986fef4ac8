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


def test_everyday_requests_are_many_and_held_out_ones_of_other_topics():
    task = chat.EverydayPrompts(seed=3, size=600, eval_size=300)
    train, held_out = contents(task, "train"), contents(task, "eval")
    assert train == contents(chat.EverydayPrompts(seed=3, size=600), "train")
    assert train[:9] != contents(chat.EverydayPrompts(seed=4, size=9), "train")
    assert len(set(train)) > 560 and not {*train} & {*held_out}
    assert not any("{" in text or "  " in text for text in train + held_out)
    # Topics and people are of one split alone.
    for word in ("bicycles", "Anna "):
        assert any(word in text for text in held_out)
        assert not any(word in text for text in train)
    assert any("step" in text and "Tom" in text for text in train)
