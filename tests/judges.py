"""Reward functions named by tests; processes that judge import them from here."""

import math
import os
import pathlib
import time

from tlt_jax import types


def odd(example: types.Example, text: str) -> float:
    """Scores 1.0 for a text of odd length: about half of what a tiny model says."""
    del example
    return float(len(text) % 2)


def constant(example: types.Example, text: str) -> float:
    """Scores every text alike: no group of it carries signal."""
    del example, text
    return 0.25


def unreliable(example: types.Example, text: str) -> float:
    """Raises, returns NaN or 1.0 by the text's length; hangs once if told where.

    It hangs if the directory in the environment's TLT_JAX_TEST_HANG holds no `hung`.
    """
    directory = os.environ.get("TLT_JAX_TEST_HANG")
    if directory and not (mark := pathlib.Path(directory, "hung")).exists():
        mark.touch()
        time.sleep(600.0)
    match len(text) % 3:
        case 0:
            raise RuntimeError(f"no verdict on {example.example_id}")
        case 1:
            return math.nan
        case _:
            return 1.0
