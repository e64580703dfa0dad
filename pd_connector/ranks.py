"""Ranks: who reads what from whom when two instances are divided differently. Every rank comes to the same answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pd_connector.errors import LayoutMismatch
from pd_connector.layout import GroupLayout, KVLayout
from pd_connector.reshard import Heads, Share

Holders = dict[str, tuple[int, ...]]
"""Per layer of a group the owners that have it, by position."""


@dataclass(frozen=True, slots=True)
class Duties:
    """What one reader rank does about a ticket. ``shares``: what it reads, per owner rank. ``readers``: how many ranks
    of its instance end the lease of each owner rank. ``idle``: owner ranks that nobody reads from (their heads are
    replicas) and whose lease this reader ends."""

    shares: dict[int, Share]
    readers: dict[int, int]
    idle: tuple[int, ...]


def duties(rank: int, readers: Sequence[KVLayout], owners: Sequence[KVLayout]) -> Duties:
    """For the reader of that rank. Raises LayoutMismatch when it cannot be served, with a diff in words."""
    if problems := _manifest(readers, owners):
        raise LayoutMismatch("the instances do not hold the same layers", problems)
    holders = [_holders(owners, group) for group in range(max(len(reader.groups) for reader in readers))]
    by_reader = {reader.rank: _shares(reader, owners, holders) for reader in readers}
    counts = {owner.rank: sum(owner.rank in taken for taken in by_reader.values()) for owner in owners}
    nobody = sorted(number for number, count in counts.items() if not count)
    order = sorted(by_reader).index(rank)
    idle = tuple(nobody[order :: len(by_reader)])
    return Duties(by_reader[rank], {number: max(count, 1) for number, count in counts.items()}, idle)


def shares(reader: KVLayout, owners: Sequence[KVLayout]) -> dict[int, Share]:
    """Per owner rank that is read from, the heads of each group. Every layer and head that the reader holds comes from
    exactly one owner; replicas are taken in turn, so that readers spread over them. Raises LayoutMismatch."""
    return _shares(reader, owners, [_holders(owners, group) for group in range(len(reader.groups))])


def _shares(reader: KVLayout, owners: Sequence[KVLayout], holders: Sequence[Holders]) -> dict[int, Share]:
    problems: list[str] = []
    taken: dict[int, dict[int, Heads]] = {}
    for group, ours in enumerate(reader.groups):
        chosen: dict[tuple[int, ...], list[tuple[int, Heads]]] = {}
        for layer in ours.layers:
            having = holders[group].get(layer, ())
            if having not in chosen:
                candidates = [(owners[n].rank, owners[n].groups[group]) for n in having]
                chosen[having] = list(_cover(ours, candidates, reader.rank))
                if missing := ours.heads - sum(heads for _, (_, heads) in chosen[having]):
                    what = f"{missing} of {ours.heads} KV heads of " if having else ""
                    problems.append(f"group {group}: theirs hold nothing of {what}layer {layer}, which ours need")
        for found in chosen.values():
            for number, heads in found:
                taken.setdefault(number, {})[group] = heads
        # A share is of all layers that both have, so ranks that hold some layers in common must hold all alike.
        by_index = {owner.rank: index for index, owner in enumerate(owners)}
        reading = {by_index[number]: heads[group] for number, heads in taken.items() if group in heads}
        for layer in ours.layers if not problems else ():
            if sum(reading[n][1] for n in holders[group][layer] if n in reading) != ours.heads:
                problems.append(f"group {group}: theirs hold layer {layer} in parts that overlap those of other layers")
    if problems:
        raise LayoutMismatch(f"rank {reader.rank} of ours cannot be served", problems[:16])
    groups = range(len(reader.groups))
    return {number: tuple(heads.get(group) for group in groups) for number, heads in sorted(taken.items())}


def _holders(owners: Sequence[KVLayout], group: int) -> Holders:
    found: dict[str, list[int]] = {}
    for number, owner in enumerate(owners):
        for layer in owner.groups[group].layers if group < len(owner.groups) else ():
            found.setdefault(layer, []).append(number)
    return {layer: tuple(numbers) for layer, numbers in found.items()}


def _manifest(ours: Sequence[KVLayout], theirs: Sequence[KVLayout]) -> list[str]:
    """Layers that only one of two instances has, in words: draft layers count, too."""
    out = []
    for group in range(max(len(layout.groups) for layout in (*ours, *theirs))):
        mine, others = (_layers_of(layouts, group) for layouts in (ours, theirs))
        missing, extra = [name for name in mine if name not in others], [name for name in others if name not in mine]
        if missing or extra:
            out.append(
                f"group {group} layers: ours {len(mine)}, theirs {len(others)}"
                + (f", missing there: {', '.join(missing[:3])}" if missing else "")
                + (f", only there: {', '.join(extra[:3])}" if extra else "")
            )
    return out


def _layers_of(layouts: Sequence[KVLayout], group: int) -> dict[str, None]:
    return dict.fromkeys(
        layer for layout in layouts if group < len(layout.groups) for layer in layout.groups[group].layers
    )


def _cover(ours: GroupLayout, holders: Sequence[tuple[int, GroupLayout]], turn: int) -> Iterator[tuple[int, Heads]]:
    """(owner rank, heads) that make up our heads, as far as the holders have them."""
    replicas: dict[Heads, list[int]] = {}
    for number, theirs in holders:
        replicas.setdefault((theirs.first_head, theirs.heads), []).append(number)
    at, end = ours.first_head, ours.first_head + ours.heads
    for (first, count), numbers in sorted(replicas.items()):
        low, high = max(at, first), min(end, first + count)
        if low < high:
            yield numbers[turn % len(numbers)], (low, high - low)
            at = high
