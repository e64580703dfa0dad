"""Which slots of a bounded pool hold what: the oldest entries make room for new ones. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass
class _Entry:
    slots: list[int]
    filling: bool = True
    """Somebody writes into them: they are nobody else's until that has ended."""
    dropped: bool = False


class Slots:
    """``count`` slots, numbered from 0. Entries are known by numbers of the caller's."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def take(self, number: int, wanted: int) -> tuple[list[int], list[int]] | None:
        """(slots for a new entry, numbers of those that went for it, oldest first); None when there is no room even so.
        It is being filled until ``filled``."""
        room = len(self._free) + sum(len(entry.slots) for entry in self._entries.values() if not entry.filling)
        if wanted > room:
            return None
        gone = []
        for other, entry in list(self._entries.items()):
            if len(self._free) >= wanted:
                break
            if not entry.filling:
                gone.append(other)
                self.drop(other)
        slots = [self._free.pop() for _ in range(wanted)]
        self._entries[number] = _Entry(slots)
        return slots, gone

    def filled(self, number: int) -> bool:
        """Nobody writes into it any more; whether it is still wanted."""
        entry = self._entries[number]
        entry.filling = False
        if entry.dropped:
            self.drop(number)
        return not entry.dropped

    def drop(self, number: int) -> bool:
        """Give an entry up; whether it was there. The slots of one that is being filled are free once it is filled."""
        entry = self._entries.get(number)
        if entry is None:
            return False
        entry.dropped = True
        if not entry.filling:
            self._free += reversed(self._entries.pop(number).slots)
        return True
