"""Which tokens a drafter can propose."""

import numpy as np
import pytest
import scipy.special

from tlt_jax.specdec.texts import layout, vocabulary


def test_the_largest_weights_are_chosen():
    weights = np.array([0, 1, 0, 3, 0, 2, 0, 0])
    choose = vocabulary.choose
    assert choose(weights, 3).tolist() == [1, 3, 5]
    # What ends a text is always there, and the rest is filled up from the front.
    assert choose(weights, 3, always=(7,)).tolist() == [3, 5, 7]
    assert choose(weights, 5).tolist() == [0, 1, 2, 3, 5]
    with pytest.raises(ValueError, match="draft_vocab_size=9 is not in .1, 8."):
        choose(weights, 9)


def records(num, length=40, prompt=7):
    rng = np.random.default_rng(3)
    for i in range(num):
        tokens = rng.integers(0, 20, length).astype(np.int32)
        hidden = rng.standard_normal((length, 6)).astype(np.float32)
        yield layout.Record(i, tokens, prompt, hidden, None, np.zeros(2, np.uint32))


def test_tokens_are_counted_behind_the_prompts():
    texts = list(records(3))
    found = vocabulary.drawn(texts, 25)
    assert found.sum() == 3 * 33 and found[20:].sum() == 0
    assert found[4] == sum((r.tokens[7:] == 4).sum() for r in texts)


@pytest.mark.parametrize("most", [10_000, 100])
def test_laws_are_summed_where_a_response_s_tokens_were_drawn(monkeypatch, most):
    monkeypatch.setattr(vocabulary, "_MOST", most)
    texts, head = list(records(12)), np.random.default_rng(5).standard_normal((30, 6))
    found = vocabulary.expected(texts, head.astype(np.float32))
    # A law stands one place before its token; nothing is drawn from the last one.
    hidden = np.concatenate([r.hidden[6:39] for r in texts])
    assert len(hidden) == 396
    every = 1 if most > 396 else 4
    laws = scipy.special.softmax(hidden[::every] @ head.T, axis=1)
    np.testing.assert_allclose(found, laws.sum(axis=0), rtol=1e-4)
    assert found.sum() == pytest.approx(396 / every)
