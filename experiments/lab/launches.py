"""Kernels that a step of a program compiled for a GPU starts, counted in its text."""

import re
from collections.abc import Mapping, Sequence

# They start nothing on a device.
_FREE = set(
    "parameter tuple get-tuple-element bitcast constant after-all opt-barrier "
    "while conditional call async-start async-done async-update".split()
)
_FREE |= {f"{kind}-done" for kind in ("copy", "all-reduce", "all-gather", "fusion")}
_NAME = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

# An instruction: what it does, and the computations that it runs.
_Instruction = tuple[str, list[str]]


def of_step(text: str) -> int:
    """Counts the kernels of the body of a program's outer loop.

    Loops within count once, of branches that with most; the condition counts, too.

    Raises:
      ValueError: the program has no loop.
    """
    computations, entry = _read(text)
    loops = [called for kind, called in computations[entry] if kind == "while"]
    if not loops:
        raise ValueError("the program has no loop: a step is the body of one.")
    return max(sum(_of(name, computations) for name in loop) for loop in loops)


def _of(name: str, computations: Mapping[str, Sequence[_Instruction]]) -> int:
    count = 0
    for kind, called in computations[name]:
        inside = [_of(each, computations) for each in called]
        if kind == "conditional":
            count += max(inside)
        elif kind in ("while", "call", "async-start"):
            count += sum(inside)
        elif kind not in _FREE:
            count += 1
    return count


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Reads computations by name, and which one is the program's entry."""
    computations: dict[str, list[_Instruction]] = {}
    here: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if match := _NAME.match(line):
                here = computations.setdefault(match[1], [])
                entry = match[1] if line.startswith("ENTRY") else entry
            continue
        if (made := line.strip().partition(" = ")[2]) and (kind := _kind(made)):
            called = [] if kind == "fusion" else _CALLED.findall(made)
            for names in _BRANCHES.findall(made):
                called += [name.strip().lstrip("%") for name in names.split(",")]
            here.append((kind, called))
    return computations, entry


def _kind(made: str) -> str | None:
    """Returns what an instruction does; its type may be a tuple's."""
    if made.startswith("("):
        depth = end = 0
        while depth or not end:
            depth += (made[end] == "(") - (made[end] == ")")
            end += 1
        made = made[end:]
    else:
        made = made.partition(" ")[2]
    match = re.match(r"\s*([a-z][\w\-]*)\(", made)
    return match and match[1]
