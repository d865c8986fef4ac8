"""When a row is finished."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.rl import engines
from tlt_jax import assembly, types
from tlt_jax.models.formats import tokenizer
from tlt_jax.rl.engine import requests, scheduler

# Ids: 0 <pad>, 1 <bos>, 2 <eos>, 3 a, 4 b.
LETTERS = tokenizer.from_alphabet("ab")


@pytest.mark.parametrize(
    ("stop", "tokens", "kept", "reason"),
    [
        (("<bos>",), [3, 1, 4], [3, 1], "stop"),
        (("a<bos>",), [4, 1, 3, 1, 3], [4, 1, 3, 1], "stop"),
        (("b", "<pad>"), [3, 0, 4], [3, 0], "stop"),
        (("<eos>",), [3, 4, 2], [3, 4, 2], "eos"),
        (("<bos>",), [3, 0, 4], [3, 0, 4], None),
        # Without a name a special token is nothing, and its letters are no text.
        (("ab",), [3, 0, 4, 3], [3, 0, 4], "stop"),
        (("b",), [3, 1, 3], [3, 1, 3], None),
    ],
)
def test_a_special_token_may_end_a_completion(stop, tokens, kept, reason):
    request = types.Request(0, 0, 0, np.ones(1, np.int32), 9)
    row = scheduler.Row(request, list(tokens), [0.0] * len(tokens))
    row.was_drafted = [False] * len(tokens)
    found = requests.finish(
        row,
        len(tokens),
        tokens[-1] == 2,
        stop=stop,
        decode_text=LETTERS.decoder_for(stop),
    )
    assert (row.tokens, found) == (kept, reason)
    assert len(row.logprobs) == len(row.was_drafted) == len(kept)


# Tokens of one or two bytes, or of no letter: é and € are of two and three.
PIECES = [
    b"a",
    b"b",
    b" ",
    b" b",
    b"",
    b"\xc3",
    b"\xa9",
    b"\xe2",
    b"\x82\xac",
    b"\xc3\xa9",
]


def by_bytes(tokens):
    """Decode as byte-level tokenizers do."""
    return b"".join(PIECES[t] for t in tokens).decode(errors="replace")


def by_runs(tokens):
    """Decode as sentencepiece with byte fallback does.

    Where bytes are no text none of the run is, and a leading space is dropped.
    """
    parts = []
    for is_run, run in itertools.groupby(tokens, lambda t: t > 4):
        data = b"".join(PIECES[t] for t in run)
        try:
            parts.append(data.decode())
        except UnicodeDecodeError:
            assert is_run
            parts.append("\ufffd" * len(data))
    return "".join(parts).removeprefix(" ")


def spelt(rng, text):
    """Write a text in one of the ways that tokens can."""
    data, tokens = text.encode().replace(b"\xef\xbf\xbd", b"\xc3"), []
    while data:
        fits = [t for t, piece in enumerate(PIECES) if data.startswith(piece)]
        tokens.append(int(rng.choice(fits)))
        data = data[len(PIECES[tokens[-1]]) :]
    return tokens


def by_whole_texts(tokens, num_new, stop, decode):
    """The twin: where a text ends by its stop strings, all of it decoded anew."""
    lengths = range(len(tokens) - num_new + 1, len(tokens) + 1)
    shows = [any(one in decode(tokens[:length]) for one in stop) for length in lengths]
    # Where the last token is the beginning of a letter, the next call will see.
    return lengths[shows.index(True)] if shows[-1] else None


@pytest.mark.parametrize("decode", [by_bytes, by_runs])
@pytest.mark.parametrize(
    "stop", [("ab b",), (" éa", "€€"), ("é€é",), ("b\ufffda",), (" " * 3, "bbbé")]
)
def test_a_stop_string_is_found_where_all_the_text_shows_it(monkeypatch, decode, stop):
    monkeypatch.setattr(requests, "_MARGIN", 4)
    rng = np.random.default_rng(len(stop[0]))
    ends = []
    for _ in range(150):
        # Some hardly ever write a whole letter.
        weights = rng.dirichlet(np.full(len(PIECES), 0.5))
        text = rng.choice(len(PIECES), 60, p=weights).tolist()
        place = int(rng.integers(20, 60))
        text[place:place] = spelt(rng, stop[int(rng.integers(len(stop)))])
        drawn, end = 0, None
        while drawn < len(text) and end is None:
            num_new = min(int(rng.integers(1, 8)), len(text) - drawn)
            drawn += num_new
            tokens = text[:drawn]
            end = by_whole_texts(tokens, num_new, stop, decode)
            found = requests._stop_length(tokens, num_new, stop, decode)
            assert found == end, (tokens, num_new)
        ends.append(end)
    assert sum((end or 0) > 30 for end in ends) > 20


def test_a_stop_string_costs_the_texts_end_alone():
    text, sizes = [0, 1, 9, 4] * 1000, []

    def counted(tokens):
        sizes.append(len(tokens))
        return by_bytes(tokens)

    for drawn in range(8, len(text), 8):
        assert requests._stop_length(text[:drawn], 8, ("ab b",), counted) is None
    # Of 4000 tokens: the new ones, and what may hold a stop string's beginning.
    assert max(sizes) <= 8 + 2 * (len("ab b") + requests._MARGIN)


def test_engines_are_given_what_names_special_tokens():
    engine = assembly.engine_of(
        engines.CFG, LETTERS, max_rows=1, max_length=8, stop=("<bos>",)
    )
    assert engine._decode_text([3, 1, 0]) == "a<bos>"
    engine.pool.close()


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match=r"stop=.'a', ''. holds an empty string"):
        dataclasses.replace(engines.BASE, stop=("a", ""))
