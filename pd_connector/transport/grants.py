"""What readers may read: lease → capability and block ids, consulted by an owner before every slice."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.transport.base import LeasedBlocks, LeaseId

MIN_CAPABILITY_BYTES = 16
MAX_CAPABILITY_BYTES = 64


def check_claim(lease: LeaseId, capability: bytes) -> None:
    """Raises LocalProtocolError for what no owner can have granted (and no message can carry)."""
    if not (0 <= lease.number < 2**63 and 0 <= lease.epoch < 2**63):
        raise LocalProtocolError(f"{lease}: number and epoch must lie in 0..2**63-1")
    if len(capability) > MAX_CAPABILITY_BYTES:
        raise LocalProtocolError(
            f"{lease}: a capability has at most {MAX_CAPABILITY_BYTES} bytes, got {len(capability)}"
        )


def check_capability(lease: LeaseId, capability: bytes) -> None:
    """Raises LocalProtocolError for one that an owner must not grant: too short to be unguessable."""
    if len(capability) < MIN_CAPABILITY_BYTES:
        raise LocalProtocolError(f"{lease}: a capability has at least {MIN_CAPABILITY_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class _Grant:
    capability: bytes
    # Per KV cache group: sorted ids, closed by one more entry for searchsorted to point at past the end.
    blocks: dict[int, npt.NDArray[np.uint32]]


class Grants:
    """Thread-safe. A lock of its own and no call out of it, so that two agents may consult each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._grants: dict[LeaseId, _Grant] = {}

    def add(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        check_claim(lease, capability)
        check_capability(lease, capability)
        sets = {group: np.unique(np.asarray(ids, np.uint32)) for group, ids in blocks.items()}
        grant = _Grant(bytes(capability), {group: np.append(ids, ids[:1]) for group, ids in sets.items() if len(ids)})
        with self._lock:
            self._grants[lease] = grant

    def remove(self, lease: LeaseId) -> None:
        with self._lock:
            self._grants.pop(lease, None)

    def clear(self) -> None:
        with self._lock:
            self._grants.clear()

    def refusal(
        self, lease: LeaseId, capability: bytes, groups: Iterable[int], blocks: npt.NDArray[np.uint32]
    ) -> str | None:
        """Why these blocks of each of these groups may not be read, or None.

        A wrong capability and a block outside the lease get one and the same answer: a reader that guesses learns
        nothing from it.
        """
        with self._lock:
            grant = self._grants.get(lease)
        if grant is None:
            return f"lease {lease.number} epoch {lease.epoch} is not granted here (not yet, or no longer)"
        allowed = hmac.compare_digest(grant.capability, capability)
        for group in groups:
            leased = grant.blocks.get(group)
            allowed = allowed and leased is not None and _within(leased, blocks)
        return None if allowed else f"lease {lease.number} epoch {lease.epoch} does not cover this read"


def _within(leased: npt.NDArray[np.uint32], blocks: npt.NDArray[np.uint32]) -> bool:
    return bool((leased[np.searchsorted(leased[:-1], blocks)] == blocks).all())
