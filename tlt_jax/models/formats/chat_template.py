"""Chat templates, rendered in a process of their own: they come from strangers.

Jinja's sandbox keeps a template from Python's inside, but not from computing for ever
or taking all memory, which the limits of the process do.
"""

import atexit
import datetime
import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from tlt_jax.foreign import process, serving

LIMIT_S = 10.0
LIMIT_BYTES = 1 << 30  # Of address space.
LIMIT_CHARACTERS = 4 << 20
# Of a text of the limit, each character escaped.
_ANSWER_BYTES = 16 * LIMIT_CHARACTERS
_SHOWN = 200  # Characters of an error.
_ENTRY = "tlt_jax.models.formats.chat_template:server"
_REMEDY = (
    "Mend the messages or the template; a chat_template.jinja beside tokenizer.json "
    "is the one that counts"
)

# What is asked of the process: a template's source, and its variables; None: only which
# ones it reads.
_Job = tuple[str, Mapping[str, Any] | None]


def render(source: str, given: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
      source: the template.
      given: what it sees by name; it can be pickled.

    Raises:
      ValueError: it cannot be rendered, takes more than `LIMIT_S` seconds or
        `LIMIT_BYTES` of memory, or its text is longer than `LIMIT_CHARACTERS`.
    """
    answer = _ask((source, given))
    if "error" in answer:
        raise ValueError(
            f"the chat template refuses the messages: {answer['error']}. {_REMEDY}."
        )
    return answer["text"]


def variables(source: str) -> set[str]:
    """Find the names that a template reads and nothing of it or of Jinja's gives.

    Raises:
      ValueError: it is no template.
    """
    answer = _ask((source, None))
    if "error" in answer:
        raise ValueError(
            f"the chat template cannot be read: {answer['error']}. {_REMEDY}."
        )
    return set(answer["names"])


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


def server(_: None) -> Callable[[_Job], dict[str, Any]]:
    """Return what the process does with a job; see `process.Process`."""
    compiled = functools.lru_cache(maxsize=8)(environment().from_string)

    def answer(job: _Job) -> dict[str, Any]:
        source, given = job
        try:
            if given is None:
                made = environment()
                found = jinja2.meta.find_undeclared_variables(made.parse(source))
                return {"names": sorted(found - set(made.globals))}
            text = compiled(source).render(given)
            if len(text) > LIMIT_CHARACTERS:
                return {"error": f"its text has {len(text)} characters"}
            return {"text": text}
        except MemoryError:
            return {"error": "it takes more memory than it may have"}
        except Exception as error:  # Whatever a stranger computes.
            told = " ".join(str(error).split()) or "no reason given"
            if not isinstance(error, jinja2.TemplateError):
                told = f"{type(error).__name__}: {told}"
            return {"error": serving.printable(told[:_SHOWN]).removesuffix(".")}

    return answer


def _ask(job: _Job) -> dict[str, Any]:
    renderer, lock = _renderer(os.getpid(), LIMIT_S)
    try:
        with lock:
            return renderer.call(job)
    except process.TooLongError:
        return {"error": f"it takes more than {LIMIT_S:g} s"}
    except process.EndedError as error:
        return {"error": f"it ends its process ({error})"}


@functools.cache
def _renderer(own: int, limit_s: float) -> tuple[process.Process, threading.Lock]:
    """Return the process that renders for `own`, whose forks have one of their own."""
    limits = process.Limits(limit_s, LIMIT_BYTES, _ANSWER_BYTES)
    renderer = process.Process("the chat template's process", _ENTRY, None, limits)

    def end():
        if os.getpid() == own:
            renderer.close()

    atexit.register(end)  # Nothing warns of what is left open.
    return renderer, threading.Lock()
