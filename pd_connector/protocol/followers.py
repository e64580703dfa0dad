"""Followers: readers that are told which blocks of a growing lease are ready."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pd_connector.protocol.context import Context
from pd_connector.protocol.lease import Lease
from pd_connector.protocol.messages import MAX_RANKS, Commit, Open, Opened, Ready, Release


@dataclass(slots=True)
class _Follower:
    route: str
    open: Open
    told: list[int] = field(default_factory=list)
    """Blocks per group that it knows of."""


class Followers:
    """Of all leases of one owner. A follower that missed something says so by another OPEN, and hears all again."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._of: dict[int, dict[tuple[int, int], _Follower]] = {}

    def add(self, route: str, message: Open, lease: Lease) -> bool:
        """False when there are too many."""
        known = self._of.setdefault(lease.number, {})
        key = message.src, message.transfer
        if key not in known and len(known) >= MAX_RANKS:
            return False
        known[key] = _Follower(route, message)
        if lease.tokens:
            self._tell(known[key], lease)
        return True

    def tell(self, lease: Lease) -> None:
        for follower in self._of.get(lease.number, {}).values():
            self._tell(follower, lease)

    def left(self, lease: Lease, message: Commit | Release) -> None:
        """A reader has what it wanted, or does not want it any more."""
        known = self._of.get(lease.number, {})
        for key in [key for key, each in known.items() if key[0] == message.src and each.open.reader == message.reader]:
            del known[key]

    def ended(self, lease: Lease) -> None:
        """Who waits for more of it would wait in vain."""
        for follower in self._of.pop(lease.number, {}).values():
            self._context.send(
                follower.route,
                Opened(
                    src=self._context.incarnation,
                    dst=follower.open.src,
                    transfer=follower.open.transfer,
                    held=False,
                    reason=f"lease {lease.number} is not held: {lease.reason}",
                    again=lease.again,
                ),
            )

    def _tell(self, follower: _Follower, lease: Lease) -> None:
        groups = range(len(lease.tokens))
        first = follower.told or [0] * len(lease.tokens)
        blocks = [lease.blocks.get(group, ()) for group in groups]
        follower.told = [len(ids) for ids in blocks]
        self._context.send(
            follower.route,
            Ready(
                src=self._context.incarnation,
                dst=follower.open.src,
                transfer=follower.open.transfer,
                lease=lease.number,
                epoch=lease.epoch,
                tokens=lease.tokens,
                first=tuple(first),
                blocks=tuple(np.asarray(blocks[group][first[group] :], "<u4").tobytes() for group in groups),
                complete=lease.complete,
            ),
        )
