"""When a row is finished."""

import dataclasses

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


def test_engines_are_given_what_names_special_tokens():
    engine = assembly.engine_of(
        engines.CFG, LETTERS, max_rows=1, max_length=8, stop=("<bos>",)
    )
    assert engine._decode_text([3, 1, 0]) == "a<bos>"
    engine.pool.close()


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match=r"stop=.'a', ''. holds an empty string"):
        dataclasses.replace(engines.BASE, stop=("a", ""))
