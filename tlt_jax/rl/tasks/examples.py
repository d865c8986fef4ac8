"""Examples of data sets."""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from tlt_jax import types
from tlt_jax.models.formats import json_file
from tlt_jax.rl.tasks import files as data_files

_COLUMNS = 12  # named in a message
_ROLES = ("system", "user", "assistant", "tool")


class _BadRow(ValueError):
    """A row that is no example; the message says what came and what is accepted."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What became of a row.

    Attributes:
      where: file and line, or row.
      example: None: it is no example.
      problem: what came and what is accepted, if it is none.
    """

    where: str
    example: types.Example | None
    problem: str = ""


def scan(
    name: str | os.PathLike,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    id_key: str = "id",
) -> Iterator[Found]:
    """Yields every row of a data set, good or bad; see `read_examples`."""
    keys = (prompt_key, answer_key, id_key)
    first_seen: dict[str, str] = {}
    for path in data_files.find(name, split, subset):
        unit = data_files.unit(path)
        for number, row in data_files.rows(path):
            here = f"{unit} {number}"
            try:
                example = _to_example(row, f"{path.stem}:{number}", *keys)
                if example.example_id in first_seen:
                    raise _BadRow(
                        f"the id {_show(example.example_id)} is that of "
                        f"{first_seen[example.example_id]}, too: ids must be distinct "
                        f"(change them, or name another column than {id_key!r})"
                    )
            except _BadRow as error:
                yield Found(f"{path}, {here}", None, str(error))
                continue
            first_seen[example.example_id] = here
            yield Found(f"{path}, {here}", example)


def read_examples(
    name: str | os.PathLike,
    *,
    on_bad: Literal["error", "skip"] = "error",
    **options: str | None,
) -> list[types.Example]:
    """Reads a data set of prompts.

    A row holds a prompt (text, or a list of messages `{"role", "content"}` that ends
    with the user's), perhaps an answer (text or a number) and perhaps an id (text or
    an integer). Rows without an id are named after their file and their number. All
    other columns become metadata. A key `a.b` reads field `b` of column `a` unless
    there is a column `a.b`.

    Args:
      name: a file with suffix `.jsonl` (one JSON object a line, UTF-8; blank lines are
        passed over), `.csv` (with a header, UTF-8; empty cells are nothing) or
        `.parquet`, a directory, or `hub:NAME`; see `data_files.find`.
      on_bad: `error` stops at the first row that is no example; `skip` leaves such
        rows out, and logs how many they were and what was wrong with the first.
      **options: `split` and `subset` of `data_files.find`; `prompt_key`, column of the
        prompt; `answer_key`, of the reference answer, and `id_key`, of the id, both of
        which may be missing or null.

    Returns:
      The examples in the files' order; their ids are distinct.

    Raises:
      ValueError: the name is of no known kind, there is no such file, a row is no
        example (the message names file and line), two ids are equal, or nothing is
        left.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad={on_bad!r} is not one of error, skip.")
    examples: list[types.Example] = []
    bad: list[str] = []
    for found in scan(name, **options):
        if found.example is not None:
            examples.append(found.example)
            continue
        bad.append(f"{found.where}: {found.problem}.")
        if on_bad == "error":
            raise ValueError(
                f"{bad[0]} Correct it, or leave such rows out with on_bad='skip'; "
                f"`python -m tlt_jax.check_data {name}` names them all."
            )
    unit = data_files.unit(pathlib.Path(name))
    if bad:
        logging.warning(
            "%s: skipped %d of %d %ss; the first: %s",
            name,
            len(bad),
            len(bad) + len(examples),
            unit,
            bad[0],
        )
    if not examples:
        raise ValueError(
            f"{name} holds no examples: "
            + (f"all {len(bad)} {unit}s were skipped." if bad else "it is empty.")
        )
    return examples


def as_chat(example: types.Example) -> types.Example:
    """Make of a prompt that is text a message of the user's."""
    if not isinstance(example.prompt, str):
        return example
    message = {"role": "user", "content": example.prompt}
    return dataclasses.replace(example, prompt=(message,))


def _to_example(
    row: Any, default_id: str, prompt_key: str, answer_key: str, id_key: str
) -> types.Example:
    if isinstance(row, bytes):
        row = _parse_line(row)
    if not isinstance(row, dict):
        raise _BadRow(f"came {_show(row)}, accepted is a JSON object with {prompt_key}")
    prompt = _look_up(row, prompt_key)
    if prompt is None and prompt_key in row:
        raise _BadRow(f"{prompt_key} is empty")
    if prompt is None:
        columns = ", ".join(sorted(map(_name, row))[:_COLUMNS]) or "(none)"
        raise _BadRow(
            f"no {prompt_key!r} among the columns {columns}: "
            "add it, or name the prompt's column with prompt_key"
        )
    answer = _look_up(row, answer_key)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise _BadRow(
            f"{answer_key}={_show(answer)}: accepted are text, a number or nothing"
        )
    example_id = _look_up(row, id_key)
    if isinstance(example_id, bool) or not isinstance(example_id, str | int | None):
        raise _BadRow(f"{id_key}={_show(example_id)}: accepted are text or an integer")
    prompt = _check_prompt(prompt, prompt_key)
    used = {prompt_key: prompt, answer_key: answer, id_key: example_id}
    _check_whole(used)
    return types.Example(
        example_id=default_id if example_id is None else str(example_id),
        prompt=prompt,
        answer=None if answer is None else str(answer),
        metadata={key: value for key, value in row.items() if key not in used},
    )


def _check_whole(columns: dict[str, Any]) -> None:
    """Refuses halves of characters, which no file of text and no tokenizer takes."""
    for key, value in columns.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise _BadRow(
                f"{key} holds half a character ({half}): text is UTF-8, and JSON "
                "escapes a character beyond U+FFFF by both of its halves"
            ) from error


def _parse_line(line: bytes) -> Any:
    try:
        return json_file.parse(line)
    except UnicodeDecodeError as error:
        raise _BadRow(f"it is not UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        text = line.decode(errors="replace").strip()
        raise _BadRow(
            f"came {_show(text)}, which is not JSON ({error.msg} at column "
            f"{error.colno}); accepted is one JSON object a line"
        ) from error
    except ValueError as error:
        raise _BadRow(f"it is no JSON that can be read: {error}") from error


def _look_up(row: dict[str, Any], key: str) -> Any:
    """Returns the value under `key`, or along its dots; None where there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _check_prompt(prompt: Any, key: str) -> str | tuple[dict[str, str], ...]:
    if isinstance(prompt, str):
        if not prompt:
            raise _BadRow(f"{key} is empty text")
        return prompt
    accepted = "accepted are text or a list of {'role': ..., 'content': ...}"
    if not isinstance(prompt, list | tuple) or not prompt:
        raise _BadRow(f"{key}={_show(prompt)}: {accepted}")
    messages = []
    for i, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise _BadRow(f"{key}[{i}]={_show(message)}: {accepted}")
        # Columns of a Parquet struct are there for every message, unused ones as null.
        message = {k: v for k, v in message.items() if v is not None}
        if set(message) != {"role", "content"} or not all(
            isinstance(value, str) for value in message.values()
        ):
            raise _BadRow(f"{key}[{i}]={_show(message)}: {accepted}, both text")
        if message["role"] not in _ROLES:
            raise _BadRow(
                f"{key}[{i}] has the role {message['role']!r}: accepted are "
                f"{', '.join(_ROLES)}"
            )
        messages.append(message)
    if messages[-1]["role"] not in ("user", "tool"):
        raise _BadRow(
            f"{key} ends with the message of {messages[-1]['role']!r}: the last one "
            "must be the user's, which the policy answers"
        )
    return tuple(messages)


def _name(column: Any) -> str:
    """Show a column's name as it is, where that is a line and not a long one."""
    text = str(column)
    return text if text.isprintable() and len(text) <= 60 else _show(column)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
