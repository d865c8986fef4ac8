"""Which texts of a buffer stay when there is no room for all."""

import dataclasses
from collections.abc import Sequence

from tlt_jax.specdec.texts import layout


@dataclasses.dataclass(eq=False)
class Entry:
    """A text and where it is.

    Attributes:
      text_id, version, length, response_start: the record's.
      num_bytes: of its arrays.
      serial: its number on disk.
      in_memory: its bytes count there.
      record: None while it is copied, and when it is on disk alone.
      on_disk: it is there.
      pins: readers and writers at work on it.
      dropped: it goes when nobody works on it any more.
    """

    text_id: int
    version: int
    length: int
    response_start: int
    num_bytes: int
    serial: int
    in_memory: bool = False
    record: layout.Record | None = None
    on_disk: bool = False
    pins: int = 0
    dropped: bool = False

    @property
    def num_bases(self) -> int:
        """Positions that drafting is learned from."""
        return layout.num_bases(self.length, self.response_start)


def least_useful(
    candidates: Sequence[Entry], together: Sequence[Entry], version: int
) -> Entry:
    """Choose the text that is missed least.

    Texts of steps before the last one go first, the oldest step's shortest. Then this
    step's texts and the last step's share the room: of the side that holds more bytes
    goes the shortest. So neither can push out the other, and long texts stay.

    There is one candidate at least; `together` are all that share the room.
    """

    def by_length(entry):
        return (entry.num_bases, entry.text_id)

    older = [e for e in candidates if e.version < version - 1]
    if older:
        return min(older, key=lambda e: (e.version, *by_length(e)))
    held = [0, 0]
    for entry in together:
        held[entry.version >= version] += entry.num_bytes
    larger = held[1] > held[0]
    side = [e for e in candidates if (e.version >= version) == larger]
    return min(side or candidates, key=by_length)


def victims_of(
    entry: Entry, there: Sequence[Entry], excess: int, version: int
) -> list[Entry] | None:
    """Choose the texts that make way for one that is coming.

    Args:
      entry: the one.
      there: those that share the room; pinned ones cannot go.
      excess: bytes that are too many with it.
      version: of this step.

    Returns:
      The texts, none if there is room, or None if it is the one itself that should go.
    """
    together = [*there, entry]
    chosen = []
    while excess > 0:
        idle = [e for e in together if not e.pins]
        victim = least_useful(idle, together, version)
        if victim is entry:
            return None
        together.remove(victim)
        chosen.append(victim)
        excess -= victim.num_bytes
    return chosen
