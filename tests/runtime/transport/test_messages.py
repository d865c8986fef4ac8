import collections
import os
import pickle
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tlt_jax import types
from tlt_jax.rl.workers import records
from tlt_jax.runtime import failures, train_state
from tlt_jax.runtime.transport import messages


def again(value):
    return messages.unpack(memoryview(b"".join(messages.pack(value))))


def test_what_processes_send_comes_back_as_it_was():
    optimizer = optax.adamw(1e-3)
    state = train_state.begin({"w": jnp.ones(3, jnp.bfloat16)}, optimizer)
    snapshot = train_state.Snapshot(
        jax.device_get(state), {"x": np.arange(3)}, {"a": 1}
    )
    interval = records.Interval(1, records.Activity.IDLE, 0.0, 1.5)
    values = [
        types.Completion(7, np.array([1], np.int32), np.zeros(1), "eos", None),
        frozenset({1}),
        (interval, records.State(workers=())),
        collections.Counter("aab"),
        np.float64(2.5),
        failures.TrainingError("so it is"),
        KeyError("no"),
    ]
    assert str(again(values)) == str(values)
    found = again(snapshot)
    assert jax.tree.structure(found.state) == jax.tree.structure(snapshot.state)
    assert found.state.params["w"].dtype == jnp.bfloat16


def test_arrays_lie_beside_the_message_where_hardware_wants_them():
    arrays = [np.arange(n, dtype=np.float32) for n in (3, 0, 1000)]
    arrays += [np.arange(6.0).reshape(2, 3)[:, ::2], np.ones(5, bool)]
    pieces = messages.pack((arrays, "text"))
    assert messages.size(pieces) < 4000 + 1200
    # No copy is made of what is sent.
    assert any(np.shares_memory(np.frombuffer(p, "u1"), arrays[2]) for p in pieces)
    part = np.empty(messages.size(pieces), np.uint8)
    part[:] = np.frombuffer(b"".join(pieces), np.uint8)
    found, text = messages.unpack(memoryview(part))
    assert text == "text" and len(found) == len(arrays)
    for one, wanted in zip(found, arrays, strict=True):
        assert one.dtype == wanted.dtype and one.tolist() == wanted.tolist()
    assert np.shares_memory(found[2], part)
    assert (found[2].ctypes.data - part.ctypes.data) % 16 == 0


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    "message",
    [b"", b"\x80\x04.", pickle.dumps(print), pickle.dumps(Harmful())],
)
def test_nothing_else_is_made(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arrays in (False, True):
        with pytest.raises(messages.MessageError, match="a message from another proc"):
            messages.loads(message, arrays=arrays)
    assert not os.listdir(tmp_path)


def test_arrays_are_made_where_they_are_wanted():
    message = pickle.dumps(np.zeros(3))
    with pytest.raises(messages.MessageError, match="holds numpy"):
        messages.loads(message)
    assert messages.loads(message, arrays=True).tolist() == [0, 0, 0]


def test_a_module_that_nobody_has_imported_is_not_imported():
    with pytest.raises(
        messages.MessageError, match=r"tlt_jax\.plots\.main, which none"
    ):
        messages.loads(b"ctlt_jax.plots\nmain\n.")
    assert "tlt_jax.plots" not in sys.modules


@pytest.mark.parametrize(
    "part,told",
    [
        (b"", "cannot be read"),
        (b"\0" * 8, "0 pieces"),
        (struct.pack("<Q", 1 << 60), "pieces"),
        (struct.pack("<2Q", 1, 5), "has 16 bytes where 21 were told"),
    ],
)
def test_a_damaged_part_is_refused(part, told):
    with pytest.raises(messages.MessageError, match=told):
        messages.unpack(memoryview(part))


def test_a_part_cut_short_is_refused():
    part = b"".join(messages.pack(np.arange(100)))
    for length in (len(part) - 1, len(part) // 2):
        with pytest.raises(messages.MessageError, match="were told"):
            messages.unpack(memoryview(part[:length]))
