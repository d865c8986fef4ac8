"""Pieces of a text, put together, are the text, wherever tokens part its characters."""

import itertools

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tlt_jax.models.formats import text_stream, tokenizer

TEXTS = ["héé", "漢字 a", "🙂🙂", "a\ufffdb", "é"]


def of_vocabulary(tokens, decoder, special=()):
    """A tokenizer that only decodes."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(list(special))
    backend.decoder = decoder
    return tokenizer.Tokenizer(backend, {})


@pytest.fixture(scope="module")
def byte_level():
    """A token is a byte; the last one is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = of_vocabulary(alphabet, decoders.ByteLevel(), ["<|end|>"])
    return made, {made.token_bytes(i)[0]: i for i in range(256)}


@pytest.fixture(scope="module")
def byte_fallback():
    """Words as sentencepiece has them, and bytes where there is no word."""
    words = ["<unk>", "</s>", "\u2581a", "b", "\u2581漢"]
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
    parts += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    made = of_vocabulary([*words, *names], decoders.Sequence(parts), ["</s>"])
    return made, {byte: len(words) + byte for byte in range(256)}


def pieces(made, parts):
    stream = text_stream.TextStream(made)
    return [*(stream.feed(part) for part in parts), stream.end()]


def splits(tokens):
    """All ways to part tokens."""
    places = range(1, len(tokens))
    for number in range(len(tokens)):
        for cuts in itertools.combinations(places, number):
            ends = [0, *cuts, len(tokens)]
            yield [tokens[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_split_gives_the_text(kind, text, request):
    made, of_byte = request.getfixturevalue(kind)
    tokens = [of_byte[byte] for byte in text.encode()]
    assert made.decode(tokens) == text
    for parts in splits(tokens):
        found = pieces(made, parts)
        assert "".join(found) == text
        # No half of a character was shown.
        assert "\ufffd" not in "".join(found).replace("a\ufffdb", "")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bytes_that_are_no_text_stream_as_they_decode(kind, request):
    made, _ = request.getfixturevalue(kind)
    rng, size = np.random.default_rng(0), made.vocab_size
    for _ in range(300):
        # Ids beyond the vocabulary, and special tokens, show nothing.
        tokens = rng.integers(0, size + 2, 12).tolist()
        tokens[3:6] = rng.integers(size - 70, size - 2, 3).tolist()
        cuts = sorted({0, *rng.integers(0, 12, 4).tolist(), 12})
        parts = [tokens[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        assert "".join(pieces(made, parts)) == made.decode(tokens), tokens


def test_text_is_shown_as_soon_as_it_is_settled(byte_level, byte_fallback):
    made, of_byte = byte_level
    one_by_one = [[of_byte[byte]] for byte in "aé!".encode()]
    assert pieces(made, one_by_one) == ["a", "", "é", "!", ""]
    # What the end leaves open is a replacement character.
    assert pieces(made, [[of_byte[0xE2]], [of_byte[0x82]]]) == ["", "", "\ufffd"]
    made, of_byte = byte_fallback
    # A run of byte tokens is text, or none of it is: its end is waited for.
    run = [[of_byte[byte]] for byte in "é".encode()]
    assert pieces(made, [[2], *run, [3]]) == ["a", "", "", "éb", ""]
    assert pieces(made, [[2], *run, [of_byte[0xFF]], [3]])[-2] == "\ufffd" * 3 + "b"
