"""Chat templates of strangers, rendered in a child process with limits.

A template comes with the weights. Jinja's sandbox keeps it away from Python, and not
from a loop over a billion numbers or a text of ten gigabytes, which end inside of one
call. So a child renders, with a bound on memory, and is replaced when it is late. It
imports nothing but Jinja, begins in a tenth of a second, and serves one text after
another.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

LIMIT_S = 10
LIMIT_BYTES = 1 << 30  # of the child's address space
LIMIT_CHARACTERS = 4 << 20
_SHOWN = 200  # characters of an error


def render(source: str, given: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
      source: the template.
      given: what it sees by name; what JSON can say.

    Raises:
      ValueError: it cannot be rendered, takes more than `LIMIT_S` seconds or
        `LIMIT_BYTES` of memory, or its text is longer than `LIMIT_CHARACTERS`.
    """
    with _LOCK:
        answer = _ask(json.dumps([source, dict(given)]))
    if "text" in answer:
        return answer["text"]
    raise ValueError(f"the chat template refuses the messages: {answer['error']}.")


def variables(source: str) -> set[str]:
    """Find the names that a template reads and nothing of it or of Jinja's gives.

    Raises:
      ValueError: it is no template.
    """
    made = environment()
    try:
        found = jinja2.meta.find_undeclared_variables(made.parse(source))
    except (jinja2.TemplateError, RecursionError) as error:
        told = " ".join(str(error).split())[:_SHOWN]
        raise ValueError(f"the chat template cannot be read: {told}.") from error
    return found - set(made.globals)


def environment() -> jinja2.Environment:
    """Make what templates run in, with the names that those on the hub rely on."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **arguments):
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **arguments)

    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's own text: rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Child:
    """The process that renders, and what it has said but nobody has read."""

    def __init__(self):
        pipe = subprocess.PIPE
        # The modules beside this one have names that others have, too.
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0
        )

    def ask(self, line: str) -> dict[str, str]:
        """Send a line and wait for the answer.

        Raises:
          OSError: the child is gone, or late.
        """
        deadline = time.monotonic() + LIMIT_S
        self.process.stdin.write(line.encode() + b"\n")
        said = b""
        while not said.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise ConnectionError
            said += part
        return json.loads(said)

    def end(self) -> None:
        """End it, and wait for that."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


_LOCK = threading.Lock()


@functools.cache
def _holder(process: int) -> list[_Child]:
    """The child of a process, once there is one; a fork's is not its parent's."""
    holder: list[_Child] = []
    atexit.register(lambda: holder and holder.pop().end())
    return holder


def _ask(line: str) -> dict[str, str]:
    holder = _holder(os.getpid())
    if not holder:
        holder.append(_Child())
    try:
        return holder[0].ask(line)
    except OSError as error:
        holder.pop().end()
        late = isinstance(error, TimeoutError)
        reason = f"more than {LIMIT_S} s" if late else "more memory than it may have"
        return {"error": f"it takes {reason}"}


def _serve() -> None:
    """Answer a line of JSON for each line of JSON, until there is no more."""
    limits = {resource.RLIMIT_AS: LIMIT_BYTES, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        # Not every system bounds a process's memory.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))
    compiled = functools.lru_cache(maxsize=8)(environment().from_string)
    for line in sys.stdin:
        try:
            source, given = json.loads(line)
            text = compiled(source).render(given)
            if len(text) > LIMIT_CHARACTERS:
                raise ValueError(f"its text has {len(text)} characters")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": "it takes more memory than it may have"}
        except Exception as error:  # whatever a stranger's program does
            told = " ".join(str(error).split()) or "no reason given"
            if not isinstance(error, jinja2.TemplateError):
                told = f"{type(error).__name__}: {told}"
            answer = {"error": told[:_SHOWN]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
