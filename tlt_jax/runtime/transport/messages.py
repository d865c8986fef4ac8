"""Values as bytes: what processes of a run send each other, and nothing else.

Values are pickled, arrays beside the pickle and not in it; of what comes nothing is
made but numbers, texts, containers, records of this package, and arrays where they are
wanted. So a message can name no code.
"""

import builtins
import dataclasses
import enum
import io
import pickle
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any

# What containers and numbers are made by, what arrays are, and whose records are.
_MAKERS = frozenset(
    [
        ("collections", "Counter"),
        ("collections", "OrderedDict"),
        ("collections", "deque"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("builtins", "bytearray"),
        ("builtins", "complex"),
        ("builtins", "slice"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "scalar"),
    ]
)
_ARRAY_MAKERS = frozenset(
    [
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
    ]
)
_DTYPES = frozenset(["bfloat16", "float8_e4m3fn", "float8_e5m2"])
_PACKAGES = frozenset(["tlt_jax", "optax"])
_COUNT = struct.Struct("<Q")
# Of arrays in a part: NumPy's own.
_ALIGNED = 16


class MessageError(ValueError):
    """What came is no message, or holds what no process sends.

    Attributes:
      what: the name of that, if it has one.
    """

    def __init__(self, told: str, what: str = ""):
        """Say what came; see the attribute."""
        super().__init__(told)
        self.what = what


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what processes of a run send each other."""

    def __init__(self, message: bytes, buffers: Iterable | None, arrays: bool):
        super().__init__(io.BytesIO(message), buffers=buffers)
        self._makers = _MAKERS | _ARRAY_MAKERS if arrays else _MAKERS

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function by its name.

        Raises:
          MessageError: it is none of those.
        """
        is_dtype = module == "ml_dtypes" and name in _DTYPES
        if (module, name) in self._makers or is_dtype:
            return super().find_class(module, name)
        # Of what this process has imported itself; naming a module must not run it.
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type):
            ours = module.partition(".")[0] in _PACKAGES
            if issubclass(found, Exception) and (ours or module == builtins.__name__):
                return found
            is_named_tuple = issubclass(found, tuple) and hasattr(found, "_fields")
            if ours and (
                dataclasses.is_dataclass(found)
                or issubclass(found, enum.Enum)
                or is_named_tuple
            ):
                return found
        raise MessageError(
            f"a message from another process holds {module}.{name}, which none of them "
            "sends: all processes must run the same version of tlt_jax.",
            f"{module}.{name}",
        )


def dumps(value: Any) -> bytes:
    """Make a message of a value, which holds no arrays; see `loads`."""
    return pickle.dumps(value, protocol=5)


def loads(message: bytes, buffers: Iterable | None = None, arrays: bool = False) -> Any:
    """Make a value of a message: numbers, texts, containers, records, errors.

    Records are dataclasses, named tuples and enumerations of this package and of optax.
    With `arrays` they may be among them, those of `buffers` in their order.

    Raises:
      MessageError: the message holds anything else, or is no message.
    """
    try:
        return _Unpickler(message, buffers, arrays).load()
    except MessageError:
        raise
    # A pickle that is damaged may fail in any way.
    except Exception as error:
        raise MessageError(
            f"a message from another process cannot be read ({type(error).__name__})."
        ) from error


def pack(value: Any) -> list[memoryview]:
    """Lay a value with arrays out as a part; its pieces are to be sent in their order.

    Arrays are not copied: the part holds while they are not changed.
    """
    buffers: list[memoryview] = []
    message = pickle.dumps(
        value,
        protocol=5,
        buffer_callback=lambda buffer: buffers.append(buffer.raw()),
    )
    lengths = [len(message), *(buffer.nbytes for buffer in buffers)]
    head = b"".join(map(_COUNT.pack, (len(lengths), *lengths)))
    pieces, at = [memoryview(head)], len(head)
    for piece in (memoryview(message), *buffers):
        pieces += [memoryview(bytes(-at % _ALIGNED)), piece]
        at += -at % _ALIGNED + piece.nbytes
    return [piece for piece in pieces if piece.nbytes]


def unpack(part: memoryview) -> Any:
    """Make the value of a part that `pack` has laid out; its arrays are views of it.

    Raises:
      MessageError: it is none, or holds what no process sends.
    """
    message, *buffers = _pieces(part)
    return loads(bytes(message), buffers, arrays=True)


def check_sendable(value: Any) -> None:
    """Make sure that another process would take a value.

    Raises:
      MessageError: it would not.
    """
    try:
        part = b"".join(pack(value))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise MessageError(f"it cannot be pickled: {error}") from error
    try:
        unpack(memoryview(part))
    except MessageError as error:
        raise MessageError(f"it holds {error.what}") from error


def size(pieces: Sequence[memoryview]) -> int:
    """Return the bytes of a part."""
    return sum(piece.nbytes for piece in pieces)


def _pieces(part: memoryview) -> list[memoryview]:
    try:
        (count,) = _COUNT.unpack_from(part)
        if not 0 < count <= len(part) // _COUNT.size:
            raise struct.error(f"{count} pieces")
        head = struct.Struct(f"<{1 + count}Q")
        _, *lengths = head.unpack_from(part)
    except struct.error as error:
        raise MessageError(
            f"a part from another process cannot be read ({error})."
        ) from error
    found, at = [], head.size
    for length in lengths:
        at += -at % _ALIGNED
        found.append(part[at : at + length])
        at += length
    if at != len(part):
        raise MessageError(
            f"a part from another process has {len(part)} bytes where {at} were told."
        )
    return found
