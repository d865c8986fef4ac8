"""JSON of strangers: an object, a key once, brackets that can be followed."""

import json
import os
from typing import Any

_SHOWN = 80  # characters of a value in a message


def show(value: Any) -> str:
    """Show a value of a file in a message: a line, and not a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def word(value: Any) -> str:
    """Show a name in a message: without quotes, a line, and not a long one."""
    return show(str(value))[1:-1]


def parse(text: str | bytes) -> Any:
    """Parse JSON.

    A key that an object says twice is refused: readers differ in which they take.

    Raises:
      ValueError: it is no JSON, repeats a key, or nests deeper than can be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("its brackets nest too deep") from error


def read(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """Read a file that holds one object.

    Args:
      path: of the file.
      remedy: what to do where it cannot be read, such as `download it again`.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: naming the file, if it does not hold an object.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            value = parse(file.read())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): {remedy}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {remedy}.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds {type(value).__name__}, not a JSON object: {remedy}."
        )
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {show(twice)} twice")
    return made
