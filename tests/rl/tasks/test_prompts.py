"""Prompts: each once per epoch, at a place that the position alone decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlt_jax import types
from tlt_jax.rl.tasks import answers, prompts


def examples(*texts):
    return [types.Example(f"e{i}", text, None) for i, text in enumerate(texts)]


def encode(example):
    return np.array([ord(c) for c in example.prompt], np.int32)


def make(*texts, max_tokens=8, long_prompts="refuse"):
    return prompts.PromptSet(
        examples(*texts), encode, max_tokens=max_tokens, long_prompts=long_prompts
    )


def ids(drawn):
    return [prompt.prompt_id for prompt in drawn]


def test_every_epoch_has_every_prompt_once_in_another_order():
    made = make(*"abcdefghijk")
    epochs = [ids(made.draw(11 * i, 11, seed=3)) for i in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(made.draw(0, 11, seed=4)) != epochs[0]


def test_a_prompt_that_opens_a_thought_says_so():
    texts = ("a<think>\n", "<think>a</think>", "<think>a", "a")
    made = prompts.PromptSet(
        examples(*texts),
        encode,
        max_tokens=20,
        long_prompts="refuse",
        decode=lambda ids: "".join(map(chr, ids)),
    )
    found = [prompt.example.metadata for prompt in made.prompts]
    assert found == [{answers.IN_THOUGHT: True}, {}, {}, {}]
    assert all(not prompt.example.metadata for prompt in make("a<think>").prompts)


def test_epoch_order_is_fixed_for_all_time():
    # Golden: a change of these numbers changes what resumed runs train on.
    assert prompts.epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert prompts.epoch_order(8, 3, 5).tolist() == [0, 6, 2, 1, 3, 4, 7, 5]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 1000))
def test_epoch_order_is_a_permutation(num_examples, seed, epoch):
    order = prompts.epoch_order(num_examples, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_examples))


def test_epoch_orders_differ_between_epochs_and_seeds():
    orders = {
        tuple(prompts.epoch_order(20, seed, epoch).tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_draws_cut_the_line_of_epochs(num_examples, count, seed):
    made = make(*"abcdefghijkl"[:num_examples])
    num_epochs = -(-10 * count // num_examples)
    orders = [prompts.epoch_order(num_examples, seed, e) for e in range(num_epochs)]
    line = np.concatenate(orders)
    for step in reversed(range(10)):
        np.testing.assert_array_equal(
            ids(made.draw(step * count, count, seed)),
            line[step * count : (step + 1) * count],
        )


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_the_line_does_not_depend_on_how_it_is_cut(count):
    made = make(*"abcde")
    whole = ids(made.draw(0, 14, seed=0))
    cut = [ids(made.draw(at, min(count, 14 - at), 0)) for at in range(0, 14, count)]
    assert sum(cut, []) == whole


def test_a_prompt_carries_its_example_and_tokens():
    made = make("ab", "c")
    (prompt,) = [p for p in made.draw(0, 2, seed=0) if p.prompt_id == 0]
    assert prompt.example.example_id == "e0"
    np.testing.assert_array_equal(prompt.tokens, [97, 98])


def test_long_prompts():
    assert make("abcd", max_tokens=4).num_skipped == 0
    with pytest.raises(ValueError) as raised:
        make("abcd", "abcde", max_tokens=4)
    assert str(raised.value) == (
        "example e1 has a prompt of 5 tokens, more than task.max_prompt_tokens=4: "
        "raise the limit, shorten the prompt, or set task.long_prompts='skip'."
    )
    made = make("abcde", "a", "b", max_tokens=4, long_prompts="skip")
    assert made.num_skipped == 1
    # The others keep the ids that they would have had.
    assert sorted(ids(made.draw(0, 2, seed=0))) == [1, 2]
    with pytest.raises(ValueError, match=r"no prompt is left of 2 \(2 are longer"):
        make("abc", "abcd", max_tokens=2, long_prompts="skip")


def test_an_empty_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match="example e1 has an empty prompt"):
        make("a", "")


def test_requests_are_numbered_group_by_group():
    made = make("a", "bc")
    drawn = [made.prompts[1], made.prompts[0], made.prompts[1]]
    requests = prompts.requests_of(drawn, 2, 7, first_id=100)
    assert [r.request_id for r in requests] == [100, 101, 102, 103, 104, 105]
    assert [r.prompt_id for r in requests] == [1, 1, 0, 0, 1, 1]
    assert [r.sample for r in requests] == [0, 1] * 3
    assert {r.max_new_tokens for r in requests} == {7}
    np.testing.assert_array_equal(requests[2].prompt, [97])
