import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.workers import columns
from tlt_jax.runtime.transport import messages


def completion(number, length, *, drafted=True, routed=0):
    rng = np.random.default_rng(number)
    return types.Completion(
        (5 << 32) + number,
        rng.integers(0, 9, length).astype(np.int32),
        rng.random(length).astype(np.float32),
        ("eos", "stop", "length")[number % 3],
        rng.random(length) < 0.5 if drafted else None,
        rng.integers(0, 7, (length + routed, 2, 3)).astype(np.uint8)
        if routed
        else None,
    )


def there_and_back(completions):
    pieces = messages.pack(columns.of_completions(completions))
    found = columns.completions_of(messages.unpack(memoryview(b"".join(pieces))))
    return found, messages.size(pieces)


@pytest.mark.parametrize(
    "settings", [{}, {"drafted": False}, {"routed": 4}], ids=["dense", "bare", "routed"]
)
def test_completions_come_back_as_they_were(settings):
    sent = [completion(i, n, **settings) for i, n in enumerate((3, 0, 1, 200))]
    found, _ = there_and_back(sent)
    assert len(found) == len(sent)
    for one, wanted in zip(found, sent, strict=True):
        assert type(one.request_id) is int and one.request_id == wanted.request_id
        assert one.finish_reason == wanted.finish_reason
        for name in ("tokens", "logprobs", "was_drafted", "routes"):
            value, expected = getattr(one, name), getattr(wanted, name)
            if expected is None:
                assert value is None
            else:
                assert value.dtype == expected.dtype and value.shape == expected.shape
                assert value.tolist() == expected.tolist()


def test_nothing_and_one_without_tokens():
    assert there_and_back([])[0] == []
    (found,), _ = there_and_back([completion(0, 0)])
    assert found.tokens.shape == (0,) and found.tokens.dtype == np.int32


def test_short_completions_travel_as_little_more_than_their_tokens():
    """Nine bytes a token; 25 for each completion, and its table of contents."""
    sent = [completion(i, 20) for i in range(1000)]
    _, num_bytes = there_and_back(sent)
    assert 0 <= num_bytes - 1000 * (20 * 9 + 25) < 1000
