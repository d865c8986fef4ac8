"""Measurements one after the other in a process that may hang, fail or be killed.

A child measures; this process, which never touches the accelerator, reads what it tells
and stops it when an item's time is up. An item that hangs costs its limit, one that
fails a line, and a new child goes on with the next: what a failed item has left on the
device is gone with its process.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from experiments.lab import tables

# Until a child has imported what it needs and found its device.
START_S = 90.0
_BEGINS, _ROW, _ENDS = "begins", "row", "ends"
_END_OF_FILE = None


@dataclasses.dataclass(frozen=True)
class Limit:
    """An item by name, and how many seconds it may take at most."""

    item: str
    seconds: float


def run(
    command: Sequence[str],
    items: Sequence[Limit],
    budget_s: float,
    log: pathlib.Path,
    environment: Mapping[str, str],
) -> Iterator[tables.Row]:
    """Has a child measure the items in order; yields rows as soon as they are there.

    Rows name their `item`; a last one of each says in `ended` how it did: `whole`, or
    why there is no more of it. An item that the budget leaves no time for is not begun.

    Args:
      command: starts a child that calls `answer`; the names of items follow it.
      items: those wanted, the most important first.
      budget_s: seconds for all of them, starts of children included.
      log: what children print.
      environment: of the children.
    """
    end, left = time.monotonic() + budget_s, list(items)
    while left and time.monotonic() < end:
        names = [limit.item for limit in left]
        with _child([*command, *names], log, environment) as lines:
            yield from _follow(lines, left, end)
    for limit in left:
        yield _ended(limit.item, "not begun: the budget was spent", 0.0)


def _follow(lines: queue.Queue, left: list[Limit], end: float) -> Iterator[tables.Row]:
    """Reads one child until it ends, or must; takes from `left` what is done."""
    while left:
        item, started = left[0].item, time.monotonic()
        until = min(started + START_S, end)
        while True:
            try:
                told = lines.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                yield _ended(item, _too_long(until == end), time.monotonic() - started)
                break
            if told is _END_OF_FILE:
                what = "its process ended: see the end of the log"
                yield _ended(item, what, time.monotonic() - started)
                break
            kind, value = told
            if kind == _BEGINS:
                started = time.monotonic()
                until = min(started + left[0].seconds, end)
            elif kind == _ROW:
                yield {"item": item, **value}
            else:
                yield _ended(item, value, time.monotonic() - started)
                break
        left.pop(0)
        # Whatever failed may have left the device in a state of its own.
        if told is _END_OF_FILE or told[0] != _ENDS or told[1] != "whole":
            return


def _too_long(is_budget: bool) -> str:
    return f"stopped: {'the budget' if is_budget else 'its limit'} was spent"


def _ended(item: str, how: str, seconds: float) -> tables.Row:
    return {"item": item, "ended": how, "item_s": round(seconds, 1)}


@contextlib.contextmanager
def _child(
    command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str]
) -> Iterator[queue.Queue]:
    """Starts a child; gives a queue of what it tells, and kills it in the end."""
    lines: queue.Queue = queue.Queue()
    with log.open("a", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            text=True,
            # With a group of its own, so that what it started goes with it.
            start_new_session=True,
        )
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reader.join()
        child.stdout.close()


def _read(stream: IO[str], lines: queue.Queue) -> None:
    for line in stream:
        lines.put(tuple(json.loads(line)))
    lines.put(_END_OF_FILE)


def answer(
    items: Iterable[tuple[str, Callable[[], Iterable[tables.Row]]]],
) -> None:
    """Measures in the child: tells each row of each item, and how it ended.

    Standard output is kept for that: what is printed goes to standard error.
    """
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(*words: Any) -> None:
        print(json.dumps(words), file=out, flush=True)

    for name, measure in items:
        print(f"--- {name}", flush=True)
        tell(_BEGINS, name)
        how = "whole"
        try:
            for row in measure():
                tell(_ROW, row)
        # Whatever it is, the other items are worth having.
        except Exception as error:
            traceback.print_exc()
            how = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
        tell(_ENDS, how)
