"""Damaged files, read in forked children whose time and memory are bounded.

A case ends well with a value that makes sense, or with an error of this package in one
line. All else is a finding: other exceptions, warnings, hangs, deaths, nonsense, and
memory beyond the bound.
"""

import contextlib
import json
import os
import pathlib
import resource
import select
import shutil
import signal
import struct
import traceback
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
from hypothesis import strategies as st

import tlt_jax
from tests.fuzzing import mutations, seeds, targets
from tlt_jax.models.formats import chat_template
from tlt_jax.runtime import failures

BATCH = 250  # cases of one child
CASE_S, SILENCE_S = 5, 20
# Beyond what the child has when it begins. The files have a few kilobytes.
BYTES = 512 * 2**20
LONGEST_MESSAGE = 1000
# Kinds whose readers start JAX, which takes its time and its memory.
_WITH_ARRAYS = "safetensors index gguf drafter eagle eagle3 speculators".split()
_PACKAGE = os.path.dirname(tlt_jax.__file__)


class Finding(NamedTuple):
    """A case that did not end well; `files` is where it lies."""

    kind: str
    problem: str
    files: str


class _Late(BaseException):
    """A case took too long; no reader may catch this."""


def run(
    kind: str, cases: int, seed: int, scratch: pathlib.Path
) -> tuple[int, int, list[Finding]]:
    """Read `cases` damaged files of a kind.

    Args:
      kind: one of `seeds.KINDS`.
      cases: how many.
      seed: decides all of them.
      scratch: a directory with the valid files in `seeds`; findings go to `findings`.

    Returns:
      How many were read, how many of them were refused, and the findings.
    """
    done = refused = 0
    findings: list[Finding] = []
    batch = 0
    while done < cases:
        size = min(BATCH, cases - done)
        lines = list(_child(kind, size, f"{seed}/{batch}/{kind}", scratch))
        if not lines:
            raise RuntimeError(f"the reader of {kind} ended without a word")
        done += len(lines)
        batch += 1
        for line in lines:
            refused += line == "refused"
            if line not in ("accepted", "refused"):
                files = scratch / "findings" / f"{kind}-{len(findings)}"
                kept = pathlib.Path(line.split("\0")[1])
                if kept.is_dir() and kept.name:
                    shutil.rmtree(files, ignore_errors=True)
                    shutil.copytree(kept, files)
                findings.append(Finding(kind, line.split("\0")[0], str(files)))
        for directory in scratch.glob(f"cases/{kind}-*"):
            shutil.rmtree(directory)
    return done, refused, findings


def _child(kind: str, size: int, seed: str, scratch) -> Iterator[str]:
    """Fork, and yield what the child says of each case."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            _read_cases(kind, size, seed, scratch, writing)
            os._exit(0)
        except BaseException as error:
            said = f"the harness fails: {_told(error)}\0"
            os.write(writing, json.dumps(said).encode() + b"\n")
            os._exit(1)
    os.close(writing)
    pending, told = b"", 0
    try:
        while True:
            if not select.select([reading], [], [], SILENCE_S)[0]:
                os.kill(pid, signal.SIGKILL)
                yield f"hangs where no signal is seen\0{_place(scratch, kind, told)}"
                break
            chunk = os.read(reading, 65536)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            told += len(lines)
            yield from (json.loads(line) for line in lines)
    finally:
        os.close(reading)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        name = signal.Signals(os.WTERMSIG(status)).name
        yield f"dies of {name}\0{_place(scratch, kind, told)}"


def _place(scratch: pathlib.Path, kind: str, number: int) -> pathlib.Path:
    return scratch / "cases" / f"{kind}-{number}"


def _read_cases(kind: str, size: int, seed: str, scratch, writing: int) -> None:
    """Make, write and read cases in the child, one line to the parent for each."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if kind in _WITH_ARRAYS:
        jax.block_until_ready(jnp.zeros(1))
    # Templates that run for ever shall not hold up thousands of cases.
    chat_template.LIMIT_S = 1.0
    read = targets.READERS[kind]
    variants = sorted((scratch / "seeds" / kind).iterdir())
    for variant in variants:
        read(variant)  # imports what it needs; a valid file is accepted
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def late(*_):
        raise _Late

    signal.signal(signal.SIGALRM, late)
    number = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=size,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def cases(data):
        nonlocal number
        directory = _place(scratch, kind, number)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(data.draw(st.sampled_from(variants)), directory)
        _damage(data, directory)
        number += 1
        said = _outcome(read, directory)
        if said in ("accepted", "refused"):
            shutil.rmtree(directory)
        else:
            said = f"{said}\0{directory}"
        os.write(writing, json.dumps(said).encode() + b"\n")

    cases()


def _damage(data, directory: pathlib.Path) -> None:
    """Damage one file of a directory, seldom two."""
    for _ in range(1 + (data.draw(st.integers(0, 9)) == 9)):
        path = data.draw(st.sampled_from(seeds.files(directory)))
        content = path.read_bytes()
        structured = {
            ".json": mutations.damage_json,
            ".jsonl": mutations.damage_lines,
            ".safetensors": mutations.damage_safetensors,
            ".jinja": mutations.damage_template,
        }.get(path.suffix)
        if structured and data.draw(st.integers(0, 3)):
            # A file that is damaged already has no structure left.
            with contextlib.suppress(ValueError, LookupError, struct.error, OSError):
                content = structured(data, content)
        else:
            content = mutations.damage(data, content)
        path.write_bytes(content)


def _outcome(read, directory: pathlib.Path) -> str:
    """Read a case: `accepted`, `refused`, or what is wrong."""
    signal.setitimer(signal.ITIMER_REAL, CASE_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(directory)
        return "accepted"
    except _Late:
        return f"takes more than {CASE_S} s"
    except (ValueError, failures.UserError) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return _judge(error)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return _told(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _judge(error: Exception) -> str:
    """Accept an error that this package raised itself, in one line."""
    own = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)
    if not own:
        return _told(error)
    message = str(error)
    if "\n" in message or not 10 < len(message) <= LONGEST_MESSAGE:
        return f"a message of {len(message)} characters or several lines: {message!r}"
    return "refused"


def _told(error: BaseException) -> str:
    """Name an error and the package's own line that it passed last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(_PACKAGE)] or frames
    place = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"
