"""The store of finished answers: its bounds, its layout."""

import numpy as np
import pytest

from tlt_jax.specdec.proposers import ngram_store


def ints(*values):
    return np.array(values, np.int32)


def lists(texts):
    return [text.tolist() for text in texts]


def test_the_oldest_go_first_within_a_prompt_and_over_all():
    store = ngram_store.NgramStore(max_texts_per_prompt=2, max_tokens=14, context=2)
    store.add(7, ints(1, 2, 3), ints(4, 5))
    store.add(8, ints(9), ints(6))
    store.add(7, ints(1, 2, 3), ints(5))
    assert lists(store.texts(7)) == [[2, 3, 5], [2, 3, 4, 5]]
    assert lists(store.texts(8)) == [[9, 6]]
    store.add(7, ints(1, 2, 3), ints(6))
    assert lists(store.texts(7)) == [[2, 3, 6], [2, 3, 5]]
    assert (len(store), store.num_tokens) == (3, 8)
    # No room for nine tokens more: the oldest of any prompt go, 8's is the oldest.
    store.add(5, ints(), ints(*range(9)))
    assert store.texts(8) == [] and lists(store.texts(7)) == [[2, 3, 6]]
    assert (len(store), store.num_tokens) == (2, 12)
    store.add(7, ints(1, 2, 3), ints())
    assert len(store) == 2 and store.texts(6) == []
    # Longer than the store: its beginning replaces everything.
    store.add(7, ints(1, 2, 3), np.arange(30))
    assert lists(store.texts(7)) == [[2, 3, *range(12)]]
    assert (len(store), store.num_tokens) == (1, 14)
    store.add(7, ints(1, 2, 3), np.arange(30))
    assert (len(store), store.num_tokens) == (1, 14)


def test_memory_stays_bounded_over_many_answers():
    rng = np.random.default_rng(0)
    store = ngram_store.NgramStore(max_texts_per_prompt=3, max_tokens=200, context=4)
    for _ in range(500):
        prompt_id = int(rng.integers(20))
        answer = rng.integers(0, 9, rng.integers(0, 40))
        store.add(prompt_id, np.full(6, prompt_id), answer)
        texts = [text for p in range(20) for text in store.texts(p)]
        assert len(store) == len(texts)
        assert store.num_tokens == sum(map(len, texts)) <= 200
        assert all(len(store.texts(p)) <= 3 for p in range(20))
        if len(answer):
            newest = [prompt_id] * 4 + answer.tolist()
            assert store.texts(prompt_id)[0].tolist() == newest


def test_layout_of_a_batch():
    store = ngram_store.NgramStore(max_texts_per_prompt=4, max_tokens=100, context=1)
    for answer in (30, 31, 32):
        store.add(3, ints(3), ints(answer))
    store.add(5, ints(5), np.arange(50, 60))
    live = [ints(3, 1), ints(5), ints(), ints(3, 2), ints(4, 4)]
    corpus, sources = store.corpus(
        [3, 5, None, 3, 4], live, num_texts=8, width=6, num_sources=4
    )
    laid_out = [
        row[:n].tolist() for row, n in zip(corpus.texts, corpus.lengths, strict=True)
    ]
    # Room for three finished ones: 3's newest, 5's only one, cut, and 3's next.
    assert laid_out == [
        *([3, 1], [5], [], [3, 2], [4, 4]),
        *([3, 32], [5, 50, 51, 52, 53, 54], [3, 31]),
    ]
    padding = np.arange(6) >= corpus.lengths[:, None]
    np.testing.assert_array_equal(corpus.texts == -1, padding)
    np.testing.assert_array_equal(
        sources,
        [
            [0, 5, 3, 7],
            [1, 6, -1, -1],
            [-1, -1, -1, -1],
            [3, 5, 0, 7],
            [4, -1, -1, -1],
        ],
    )
    assert corpus.texts.dtype == corpus.lengths.dtype == sources.dtype == np.int32
    _, few = store.corpus([3, 3], live[:2], num_texts=2, width=6, num_sources=1)
    np.testing.assert_array_equal(few, [[0], [1]])


@pytest.mark.parametrize(
    "bounds,message",
    [
        (dict(max_texts_per_prompt=0, max_tokens=9), "max_texts_per_prompt=0"),
        (dict(max_texts_per_prompt=1, max_tokens=8), "max_tokens=8 has no room"),
        (dict(max_texts_per_prompt=1, max_tokens=8, context=-1), "context=-1"),
    ],
)
def test_bounds_that_keep_nothing_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        ngram_store.NgramStore(**bounds)


def test_batches_that_do_not_fit_are_refused():
    store = ngram_store.NgramStore(1, 100)
    shape = dict(num_texts=1, width=2, num_sources=1)
    with pytest.raises(ValueError, match="names 2 rows and live 1"):
        store.corpus([1, 2], [ints(1)], **shape)
    with pytest.raises(ValueError, match="num_texts=1 is less than the 2 rows"):
        store.corpus([1, 2], [ints(1), ints(2)], **shape)
    with pytest.raises(ValueError, match="width=2 is less than the 3 tokens"):
        store.corpus([1], [ints(1, 2, 3)], **shape)
