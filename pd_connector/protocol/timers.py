"""Deadlines keyed by what they are for; pure bookkeeping over times that the caller supplies."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator


class Timers:
    """At most one deadline per key; setting it again moves it. O(log n) each, cancelled entries are dropped lazily."""

    def __init__(self) -> None:
        self._when: dict[Hashable, float] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._sequence = 0

    def set(self, key: Hashable, when: float) -> None:
        if self._when.get(key) == when:
            return  # its entry is in the heap: a second one could never be told from it and would stay
        self._when[key] = when
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, key))
        if len(self._heap) > 64 + 4 * len(self._when):
            self._heap = [entry for entry in self._heap if self._when.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def cancel(self, key: Hashable) -> None:
        self._when.pop(key, None)

    def next(self) -> float | None:
        while self._heap:
            when, _, key = self._heap[0]
            if self._when.get(key) == when:
                return when
            heapq.heappop(self._heap)
        return None

    def due(self, now: float) -> Iterator[Hashable]:
        """Every key whose deadline is not after ``now``, each forgotten as it is yielded."""
        while (when := self.next()) is not None and when <= now:
            key = heapq.heappop(self._heap)[2]
            del self._when[key]
            yield key

    def __len__(self) -> int:
        return len(self._when)
