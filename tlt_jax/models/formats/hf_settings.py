"""Entries of a Hugging Face `config.json`, read with their type and range checked."""

from collections.abc import Mapping
from typing import Any

from tlt_jax.models.formats import json_file


def integer(
    settings: Mapping[str, Any],
    key: str,
    default: int | None = None,
    at_least: int = 1,
    at_most: int = 2**31 - 1,
) -> int:
    """Return an integer entry, `default` where it is absent or null.

    Raises:
      ValueError: naming the key, if it is anything else, less than `at_least` or more
        than `at_most`.
    """
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < at_least:
        raise ValueError(
            f"{key}={json_file.show(value)}; accepted: an integer of {at_least} or "
            "more."
        )
    if value > at_most:
        raise ValueError(f"{key}={json_file.show(value)}; accepted: at most {at_most}.")
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
    # Compared before it becomes a float: an integer may be too large for one.
    if not ok or not 0 < value < 1e300:
        raise ValueError(
            f"{key}={json_file.show(value)}; accepted: a number above zero."
        )
    return float(value)


def boolean(settings: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Return true or false, `default` where it is absent or null.

    Raises:
      ValueError: naming the key, if it is anything else.
    """
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key}={json_file.show(value)}; accepted: true or false.")
    return value
