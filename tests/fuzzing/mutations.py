"""Damage to valid files: of their bytes, and of the structure that JSON has."""

import json
import struct

from hypothesis import strategies as st

# What readers trip over: signs, sizes, types, halves of characters, paths.
NASTY = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**32 + 1, 2**63, 10**30, -(2**63)),
    *(0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "1", "NaN", "x" * 3000, "\0", "\ud800", "é\n", "step", "💥" * 40),
    *("../../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "~", "C:\\x"),
    *([], {}, [[]], [0], [-1], [1, 1], [None], ["x"], {"": 0}, {"x": {"y": []}}),
)
NUMBERS = (0, 1, 2, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
NUMBERS = (*NUMBERS, 2**64 - 1)
# Where the sizes of a binary file stand; the rest of it is plain numbers.
HEAD_BYTES = 4096

VALUES = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


class Pairs(list):
    """An object of JSON as its pairs: a key may occur twice."""


def damage(data, content: bytes, rounds: int = 3) -> bytes:
    """Flip, cut, insert, repeat, move or overwrite up to `rounds` places."""
    out = bytearray(content)
    for _ in range(_few(data, rounds)):
        out = _damage_once(data, out)
    return bytes(out)


def _few(data, most: int) -> int:
    """One, mostly: what is damaged everywhere is refused by the first check."""
    return data.draw(st.sampled_from((1, 1, 1, *range(1, most + 1))))


def _damage_once(data, out: bytearray) -> bytearray:
    kinds = ("flip", "cut", "drop", "insert", "splice", "number", "number")
    kind = data.draw(st.sampled_from(kinds))
    at = data.draw(st.integers(0, max(len(out) - 1, 0)))
    if data.draw(st.booleans()):
        at %= HEAD_BYTES
    length = data.draw(st.integers(1, 64))
    if kind == "flip" and out:
        out[at % len(out)] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del out[at:]
    elif kind == "drop":
        del out[at : at + length]
    elif kind == "insert":
        out[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    elif kind == "splice":
        start = data.draw(st.integers(0, max(len(out) - 1, 0)))
        out[at:at] = out[start : start + length]
    else:
        form = data.draw(st.sampled_from(("<I", "<Q", "<B")))
        value = data.draw(st.sampled_from(NUMBERS))
        packed = struct.pack(form, value % 256 ** struct.calcsize(form))
        out[at : at + len(packed)] = packed
    return out


def damage_json(data, content: bytes, rounds: int = 3) -> bytes:
    """Replace, remove, rename or repeat up to `rounds` values of a JSON text."""
    try:
        value = json.loads(content, object_pairs_hook=Pairs)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    for _ in range(_few(data, rounds)):
        value = _change(data, value)
    deep = data.draw(st.integers(0, 60)) == 60
    text = _text(value)
    if deep:
        text = text[:-1] + (', "x": ' if isinstance(value, Pairs) else ", ")
        text += "[" * 40_000 + "]" * 40_000 + ("}" if isinstance(value, Pairs) else "]")
    return text.encode("utf-8", "surrogatepass")


def _change(data, value):
    """Change one place at random, the nearer to the top the likelier."""
    inner = isinstance(value, list) and len(value) > 0
    if not inner or data.draw(st.integers(0, 12)) == 12:
        return _pairs(data.draw(VALUES))
    out = type(value)(value)
    i = data.draw(st.integers(0, len(out) - 1))
    is_object = isinstance(out, Pairs)
    item = out[i][1] if is_object else out[i]
    kinds = ("inside", "inside", "replace", "replace", "remove", "repeat", "rename")
    kind = data.draw(st.sampled_from(kinds))
    if kind == "inside":
        item = _change(data, item)
    elif kind == "replace":
        item = _pairs(data.draw(VALUES))
    if kind == "remove":
        del out[i]
    elif kind == "repeat":
        other = item if data.draw(st.booleans()) else _pairs(data.draw(VALUES))
        out.insert(i, (out[i][0], other) if is_object else other)
    elif kind == "rename" and is_object:
        names = [name for name, _ in value]
        new = data.draw(st.sampled_from(names) | st.text(max_size=8))
        out[i] = (new, item)
    else:
        out[i] = (out[i][0], item) if is_object else item
    return out


def _pairs(value):
    if isinstance(value, dict):
        return Pairs((key, _pairs(item)) for key, item in value.items())
    return [_pairs(item) for item in value] if isinstance(value, list) else value


def _text(value) -> str:
    if isinstance(value, Pairs):
        inner = ", ".join(f"{json.dumps(k)}: {_text(item)}" for k, item in value)
        return "{" + inner + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)


def damage_lines(data, content: bytes) -> bytes:
    """Damage a few lines of a file of JSON lines."""
    lines = content.splitlines() or [b""]
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        try:
            lines[i] = damage_json(data, lines[i], 2)
        except ValueError:  # damaged before
            lines[i] = damage(data, lines[i], 1)
    return b"\n".join(lines) + b"\n"


def damage_safetensors(data, content: bytes) -> bytes:
    """Damage the header's JSON, and say its new length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = damage_json(data, content[8 : 8 + length], 2)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damage_template(data, content: bytes) -> bytes:
    """Put pieces of templates into one."""
    pieces = (
        *("{{ 1/0 }}", "{{ 'a' * 10**10 }}", "{{ [0] * 10**9 }}", "{{ 10**10**8 }}"),
        *("{{ 'a'|center(10**10) }}", "{{ '%99999999999d' % 1 }}", "{% if %}"),
        *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[9] }}"),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}",
        *("{{ messages[0].content.x.y }}", "{{ ''.__class__.__mro__ }}", "{{ x|y }}"),
        *("{% include '/etc/passwd' %}", "{{ raise_exception('no\nno') }}", "\x00"),
        *("{{ range(10**9)|list }}", "{% set x = messages %}", "{% endfor %}", "{{"),
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        *("{{ messages|tojson(indent=10**9) }}", "{{ strftime_now('%') }}", "{{ -x }}"),
        *("{{ strftime_now(1) }}", "{{ messages|sum }}", "{{ messages.append(1) }}"),
        *("{{ 'x'.join(messages) }}", "{{ messages[0]() }}", "{{ loop.index }}"),
        *(
            "{{ namespace(1) }}",
            "{{ cycler() }}",
            "{{ lipsum(10**6) }}",
            "{{ 1 + '' }}",
        ),
    )
    text = bytearray(content)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.sampled_from((0, len(text))) | st.integers(0, len(text)))
        text[at:at] = data.draw(st.sampled_from(pieces)).encode()
    return bytes(text)
