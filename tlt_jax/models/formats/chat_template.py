"""Chat templates, rendered in a process of their own: they come from strangers.

Jinja's sandbox keeps a template from Python's inside, but not from computing for ever
or taking all memory, which the limits of the process do.
"""

import atexit
import datetime
import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from tlt_jax.foreign import process, serving

_ENTRY = "tlt_jax.models.formats.chat_template:server"
_LIMITS = process.Limits(call_s=10.0, memory_bytes=1 << 30, answer_bytes=1 << 26)
# So that the answer, each character escaped twice, stays below its limit.
_MAX_CHARACTERS = 1 << 22
_REMEDY = (
    "mend the messages or the template (a chat_template.jinja beside tokenizer.json is "
    "the one that counts)"
)

# What is asked of the process: a template's source, and its variables; None: only which
# ones it reads.
_Job = tuple[str, Mapping[str, Any] | None]


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a template.

    Args:
      source: in Jinja, with what templates on the hub rely on.
      variables: what it sees, by name; they can be pickled.

    Raises:
      ValueError: it is no template, raises something, takes more than 10 seconds or 1
        GiB, or the text is longer than four million characters.
    """
    return _ask((source, variables))


def undeclared(source: str) -> list[str]:
    """Returns the names of the variables that a template reads, sorted.

    Raises:
      ValueError: see `render`.
    """
    return _ask((source, None))


def server(_: None) -> Callable[[_Job], dict[str, Any]]:
    """Returns what the process does with a job; see `process.Process`."""

    def answer(job: _Job) -> dict[str, Any]:
        source, variables = job
        problem = "cannot be read"
        try:
            template, names = _compile(source)
            problem = "refuses the messages"
            text = None if variables is None else template.render(**variables)
        except jinja2.TemplateError as error:
            return {"problem": f"{problem}: {serving.printable(str(error))[:500]}"}
        except Exception as error:  # Whatever a stranger computes.
            what = f"{type(error).__name__}: {error}"[:500].removesuffix(": ")
            return {"problem": f"{problem}: {serving.printable(what)}"}
        if text is not None and len(text) > _MAX_CHARACTERS:
            return {"problem": f"makes a text of {len(text)} characters"}
        return {"answer": names if text is None else text}

    return answer


def _ask(job: _Job) -> Any:
    renderer, lock = _renderer()
    try:
        with lock:
            found = renderer.call(job)
    except process.TooLongError:
        found = {"problem": f"takes more than {_LIMITS.call_s:g} s"}
    except process.EndedError as error:
        found = {"problem": f"ends its process ({error})"}
    if "problem" in found:
        problem = found["problem"].removesuffix(".")
        raise ValueError(f"the chat template {problem}: {_REMEDY}.")
    return found["answer"]


@functools.cache
def _renderer() -> tuple[process.Process, threading.Lock]:
    """Returns the process for all templates; it starts with the first one."""
    renderer = process.Process("the chat template's process", _ENTRY, None, _LIMITS)
    atexit.register(renderer.close)  # Nothing warns of what is left open.
    return renderer, threading.Lock()


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> tuple[jinja2.Template, list[str]]:
    """Compiles a template, and finds what it reads beside what all templates have."""
    environment = _environment()
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), sorted(names - set(environment.globals))


def _environment() -> jinja2.Environment:
    """Makes what templates run in, with the names that those on the hub rely on."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **arguments):
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **arguments)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's own text: rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
