"""Host records that all share: no JAX until it is asked for."""

import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from tlt_jax import types

PROGRAM = """
import sys
from tlt_jax import types
example = types.Example("e1", "1+1=", "2")
assert "jax" not in sys.modules
types.Array
assert "jax" in sys.modules
"""


def test_processes_that_only_judge_start_without_jax():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_there_is_nothing_else_on_demand():
    assert types.Array is jax.Array
    with pytest.raises(AttributeError, match="'tlt_jax.types' has no attribute 'Arra'"):
        _ = types.Arra


def test_records_travel_and_share_nothing():
    first, second = (types.Example(f"e{i}", "text", None) for i in range(2))
    first.metadata["seen"] = True
    assert second.metadata == {}
    tokens = np.array([3, 1], np.int32)
    made = types.Completion(7, tokens, np.float32([-0.5, -1]), "stop")
    assert made.was_drafted is None
    there = pickle.loads(pickle.dumps(made))
    assert (there.request_id, there.finish_reason) == (7, "stop")
    np.testing.assert_array_equal(there.tokens, [3, 1])
