"""Following a growing lease: what each owner rank has ready, what of it is planned, and what may be used. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pd_connector.errors import TransferFailed
from pd_connector.protocol.events import BlocksReady
from pd_connector.runtime.planner import Demand, Ids


@dataclass(slots=True)
class _Track:
    """Of one owner rank: per group its blocks, and up to which token it is planned; for each part how far it goes."""

    sources: list[list[Ids]]
    planned: list[int]
    ends: list[tuple[int, ...]] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    """Parts that are confirmed behind ``whole``, the first one that is not."""
    whole: int = 0


class Following:
    """By some transfers, one per owner rank. ``units``: tokens per group of which only whole multiples are read before
    the end, so that the blocks of both sides end there."""

    def __init__(self, demands: Sequence[Demand], units: Sequence[int], transfers: Iterable[int]) -> None:
        self.demands = tuple(demands)
        self._units = tuple(units)
        self._tracks: dict[int, _Track] = {}
        for transfer in transfers:
            self._add(transfer)

    def _add(self, transfer: int) -> None:
        first = [demand.first for demand in self.demands]
        self._tracks[transfer] = _Track([[np.zeros(0, np.uint32)] for _ in first], first)

    def more(self, note: BlocksReady) -> list[Demand]:
        """What can be read now that could not before: per group a range, which may be empty. None at all when that
        makes no part: nothing that is wanted is new.

        Raises TransferFailed when the lease is complete without all that is wanted."""
        track, ranges = self._tracks[note.transfer], []
        for group, demand in enumerate(self.demands):
            track.sources[group].append(np.asarray(note.blocks[group], np.uint32))
            first, last = track.planned[group], min(note.tokens[group], demand.last)
            if note.complete and last < demand.last:
                raise TransferFailed(f"the lease is complete with {last} of {demand.last} tokens of group {group}")
            if not note.complete:
                last -= last % self._units[group]
            ranges.append((first, max(first, last)))
        if not note.complete and all(first == last for first, last in ranges):
            return []
        track.planned = [last for _, last in ranges]
        track.ends.append(tuple(track.planned))
        return [self._demand(track, group, *each) for group, each in enumerate(ranges)]

    def _demand(self, track: _Track, group: int, first: int, last: int) -> Demand:
        demand = self.demands[group]
        source = np.concatenate(track.sources[group])
        track.sources[group] = [source]
        ends = demand.to_the_end and last == demand.last
        return replace(demand, source=source, first=first, last=last, to_the_end=ends)

    def confirmed(self, transfer: int, part: int) -> None:
        track = self._tracks[transfer]
        track.done.add(part)
        while track.whole in track.done:
            track.done.remove(track.whole)
            track.whole += 1

    @property
    def usable(self) -> tuple[int, ...]:
        """Per group, up to which token everything may be used: parts are confirmed in any order, so without a gap."""
        reached = []
        for track in self._tracks.values():
            some = track.ends[track.whole - 1] if track.whole else tuple(demand.first for demand in self.demands)
            reached.append(some)
        return tuple(map(min, zip(*reached, strict=True)))

    def rest(self) -> tuple[Demand, ...]:
        """What has to be read again when the lease ended: with one group all that is not confirmed."""
        if len(self.demands) > 1:
            return self.demands
        (demand,), (first,) = self.demands, self.usable
        return (replace(demand, first=first),)

    def lost_blocks(self, sizes: Sequence[int]) -> set[int]:
        """Destination blocks that hold nothing of value. ``sizes``: their tokens per group."""
        out: set[int] = set()
        for demand, size, first in zip(self.rest(), sizes, self.usable, strict=True):
            at = 0 if len(self.demands) > 1 else (first - demand.start) // size
            out.update(demand.target[at:].tolist())
        return out
