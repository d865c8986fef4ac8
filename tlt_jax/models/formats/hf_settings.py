"""Entries of a Hugging Face `config.json`, read with their type and range checked."""

import math
from collections.abc import Mapping
from typing import Any


def integer(
    settings: Mapping[str, Any], key: str, default: int | None = None, at_least: int = 1
) -> int:
    """Return an integer entry, `default` where it is absent or null.

    Raises:
      ValueError: naming the key, if it is anything else or less than `at_least`.
    """
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"{key}={value!r}; accepted: an integer of {at_least} or more."
        )
    return value


def positive(
    settings: Mapping[str, Any], key: str, default: float | None = None
) -> float:
    """Return a number above zero, `default` where it is absent or null.

    Raises:
      ValueError: naming the key, if it is anything else.
    """
    value = settings.get(key)
    value = default if value is None else value
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}; accepted: a number above zero.")
    return float(value)


def boolean(settings: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Return true or false, `default` where it is absent or null.

    Raises:
      ValueError: naming the key, if it is anything else.
    """
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}; accepted: true or false.")
    return value
