"""What of a run's records can be shown: values of the types that pictures are made of.

Records are read while a run writes them, after it was killed, and from other versions.
A value that is not what its name says is left out, and never ends a report.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tlt_jax.models.formats import json_file

# Names whose values are text, and those whose values may be lists; the rest: numbers.
_TEXTS = frozenset({"specdec/strategy", "specdec/rule"})
_LARGEST = 1e30  # beyond it pictures have no axis


def rows(read: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Leave of `metrics.read` what can be shown: text, numbers, lists of numbers."""
    return [
        {name: value for name, value in row.items() if _fits(name, value)}
        for row in read
    ]


def number(row: Mapping[str, Any], name: str) -> float | None:
    """Return a row's number, None where there is none."""
    value = row.get(name)
    return value if _is_number(value) else None


def numbers(row: Mapping[str, Any], name: str) -> list[float]:
    """Return a row's list of finite numbers, empty where there is none."""
    value = row.get(name)
    whole = isinstance(value, list) and all(map(_is_finite, value))
    return value if whole else []


def completions(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of kept completions.

    Returns:
      The records that can be shown, and how many lines cannot.
    """
    records, num_left_out = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json_file.parse(line)
        except ValueError:
            record = None
        if _is_completion(record):
            records.append(record)
        else:
            num_left_out += 1
    return records, num_left_out


def _fits(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return isinstance(value, str)
    if isinstance(value, list):
        return all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether it is a number, finite and drawable or said not to be finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # Compared as it is: an integer may be too large for a float.
    return abs(value) < _LARGEST or value != value or abs(value) == math.inf


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_completion(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    texts = ("text", "finish_reason")
    if not all(isinstance(record.get(name), str) for name in texts):
        return False
    if not isinstance(record.get("answer"), str | None):
        return False
    if not _is_index(record.get("num_tokens")) or not _is_finite(record.get("reward")):
        return False
    tokens, drafted = record.get("tokens"), record.get("drafted")
    if tokens is not None and not (
        isinstance(tokens, list) and all(map(_is_index, tokens))
    ):
        return False
    return _is_prompt(record) and _are_spans(drafted, len(tokens or ()))


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_prompt(record: Mapping[str, Any]) -> bool:
    prompt = record.get("prompt", record.get("example_id"))
    if isinstance(prompt, list):
        return all(
            isinstance(one, dict)
            and isinstance(one.get("role"), str)
            and isinstance(one.get("content"), str)
            for one in prompt
        )
    return isinstance(prompt, str)


def _are_spans(drafted: Any, length: int) -> bool:
    """Whether these are rising spans of tokens, or None."""
    if drafted is None:
        return True
    at = 0
    for span in drafted if isinstance(drafted, list) else [None]:
        two = isinstance(span, list) and len(span) == 2 and all(map(_is_index, span))
        if not two or not at <= span[0] <= span[1] <= length:
            return False
        at = span[1]
    return True
