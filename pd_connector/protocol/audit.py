"""Audits: what a reader says that it read, looked at before the owner digests the same bytes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pd_connector.layout import KVLayout
from pd_connector.plan import Ids, Place, Side
from pd_connector.protocol.messages import DIGEST_BYTES, Audit


def sides_of(audit: Audit) -> tuple[Side, ...]:
    """What is to be digested. The audit has no problem."""
    return tuple(
        Side(np.frombuffer(plan.blocks, "<u4"), tuple(Place(*place) for place in plan.places)) for plan in audit.plans
    )


def audit_problem(audit: Audit, layout: KVLayout, leased: Mapping[int, Ids]) -> str:
    """Why it cannot be digested, or nothing. Every byte must lie in a leased block, and none be digested repeatedly."""
    grids = [(group, size) for group, one in enumerate(layout.groups) for size in one.grid_bytes]
    held = {group: np.unique(np.asarray(ids, np.uint32)) for group, ids in leased.items()}
    room = sum(len(held[group]) * layout.block_bytes(group) for group in held if group < len(layout.groups))
    digests = 0
    for plan in audit.plans:
        if len(plan.blocks) % 4:
            return "audit: malformed"
        blocks = np.frombuffer(plan.blocks, "<u4")
        digests += len(blocks) * len(plan.places)
        groups = set()
        for place in (Place(*each) for each in plan.places):
            if place.grid >= len(grids):
                return "audit: names a grid that does not exist here"
            group, size = grids[place.grid]
            few = all(count >= 1 for count, _ in place.dims) and place.run_bytes and place.num_bytes <= size
            if not few or place.offset + place.span > size:
                return "audit: names bytes that do not lie in a block"
            room -= len(blocks) * place.num_bytes
            groups.add(group)
        if room < 0:
            return "audit: names more bytes than are leased"
        if not all(_within(blocks, held.get(group)) for group in groups):
            return "audit: names a block that is not leased"
    if not digests or digests * DIGEST_BYTES != len(audit.digests):
        return "audit: the number of digests does not match the blocks"
    return ""


def _within(blocks: npt.NDArray[np.uint32], held: npt.NDArray[np.uint32] | None) -> bool:
    """Are all of them among these, which ascend?"""
    if held is None or not len(held):
        return not len(blocks)
    return bool((held[np.searchsorted(held, blocks).clip(max=len(held) - 1)] == blocks).all())


def first_difference(ours: bytes, audit: Audit) -> str:
    """Where digests differ, in words."""
    a, b = (np.frombuffer(digests, f"V{DIGEST_BYTES}") for digests in (ours, audit.digests))
    wrong = np.flatnonzero(a != b).tolist()
    at = wrong[0] if wrong else 0
    for side in sides_of(audit):
        here = len(side.blocks) * len(side.places)
        if at < here:
            place, block = divmod(at, len(side.blocks))
            where = f"block {int(side.blocks[block])} of grid {side.places[place].grid}"
            return f"{len(wrong)} of {len(b)} digests differ, first in {where}"
        at -= here
    return "the digests differ"
