"""The interface of every transport. READ is the only data verb: the reader posts, the owner only grants.

Threading: every method may be called from any thread, returns without waiting for a peer and never calls back. Results
come out of ``poll`` alone, one terminal Completion per tag; ``fileno`` becomes readable when ``poll`` has something.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pd_connector.memory import MemoryKind, Region
from pd_connector.plan import CopyPlan

PeerId = str
"""Names one incarnation of one remote agent."""


@dataclass(frozen=True, slots=True)
class LeaseId:
    """One lease at its owner: ``number`` never repeats within the owner's incarnation, ``epoch`` grows when the lease
    is granted again with other bytes."""

    number: int
    epoch: int


LeasedBlocks = Mapping[int, npt.NDArray[np.uint32]]
"""Block ids per KV cache group that a lease covers."""


class Scope(StrEnum):
    PROCESS = "process"
    HOST = "host"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Traits:
    """What a transport can do: memory kinds it reads from and into, and how far it reaches."""

    memory: frozenset[MemoryKind]
    scope: Scope


class Status(StrEnum):
    DONE = "done"  # every byte is visible to any CPU code started afterwards
    CANCELLED = "cancelled"  # nothing of this read can write any more
    NOT_GRANTED = "not_granted"  # the owner's transport does not know the lease (yet, or any more)
    PEER_LOST = "peer_lost"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Completion:
    """The one terminal answer to a tag. After any status the destination is quiet."""

    tag: int
    status: Status
    detail: str = ""


class Transport(ABC):
    name: ClassVar[str]
    traits: ClassVar[Traits]
    attempt_s: ClassVar[float] = 2.0
    """For a connection, while there is another transport to go to: the session gives HELLO and all of them 5 s."""
    for_devices: ClassVar[bool] = False
    """Whether host memory has better ones: then it is not started for it, unless a device's is there too."""
    instead_of: ClassVar[str] = ""
    """A transport beside which ``auto`` has no need of this one."""

    abandoned: bool = False
    """Of one that is closed: a device that was given up may still write, for ever, into what was registered, which is
    kept alive. Nobody may use it again."""

    @abstractmethod
    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        """``agent`` names the owning agent's incarnation; ``options`` come from config ``transport_options[name]``.

        Raises ConfigError for an option it does not know, TransportUnavailable when it cannot start."""

    @property
    def wire_name(self) -> str:
        """The name under which a peer is offered ``describe``; a wrapper gives the name of what it wraps."""
        return self.name

    @classmethod  # noqa: B027 - a transport need not have options
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for options that no host could use, also where the transport itself cannot be used."""

    @classmethod
    @abstractmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        """Why the transport is unavailable here, or None; never raises."""

    @classmethod
    def suit(cls, options: Mapping[str, Any], regions: Sequence[Region]) -> Mapping[str, Any]:
        """The options for an agent with this memory; what was configured stays as it is."""
        return options

    @abstractmethod
    def describe(self) -> bytes:
        """What a reader needs to connect; travels in HELLO (at most 1 KiB)."""

    @abstractmethod
    def can_reach(self, remote: bytes) -> str | None:
        """Why a peer that described itself so cannot be read from here, or None; never raises."""

    @abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Make regions readable by peers and writable by our reads; called once per set, may block."""

    @abstractmethod
    def unregister(self) -> None:
        """Forget all regions. Every read must have ended and every lease been revoked before."""

    @abstractmethod
    def grant(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        """From now on a reader that shows ``capability`` may read these blocks and no others."""

    @abstractmethod
    def revoke(self, lease: LeaseId) -> None:
        """On return no further operation of the lease starts; one already running may finish."""

    @abstractmethod
    def connect(self, peer: PeerId, remote: bytes, tag: int) -> None:
        """Reach a peer; DONE when a read could be posted."""

    @abstractmethod
    def disconnect(self, peer: PeerId) -> None:
        """Forget a peer; reads still posted to it end first, as in ``fence``."""

    @abstractmethod
    def post_read(
        self, peer: PeerId, lease: LeaseId, capability: bytes, plan: CopyPlan, tag: int, priority: int = 0
    ) -> None:
        """Read leased remote blocks into local ones. ``priority`` 0: a request waits for it; 1: background."""

    @abstractmethod
    def cancel(self, tag: int) -> None:
        """End this read only: CANCELLED once nothing of it can write any more. Unknown tags are ignored."""

    @abstractmethod
    def fence(self, peer: PeerId, tag: int) -> None:
        """Every read posted to the peer before ends first, then ``tag`` completes DONE; later reads reconnect."""

    @abstractmethod
    def poll(self, limit: int) -> list[Completion]:
        """At most ``limit`` completions; never waits."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; idempotent. Reads still posted never write after the return, unless ``abandoned``."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that polls readable while ``poll`` has completions or work to do."""
