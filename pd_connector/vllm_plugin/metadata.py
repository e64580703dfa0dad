"""What the scheduler side tells the workers each step, and what a worker tells the scheduler side once."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from pd_connector.layout import KVLayout
from pd_connector.protocol.ticket import Ticket


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Where a worker's agent listens, and what its memory is like."""

    address: str
    incarnation: int
    layout: KVLayout
    pool: PoolHandshake | None = None


@dataclass(frozen=True)
class PoolHandshake:
    """The same of a worker's host pool, which has ``slots``: each takes one block of every KV cache group."""

    address: str
    incarnation: int
    layout: KVLayout
    slots: int


@dataclass(frozen=True)
class Save:
    """Copy the blocks of the ticket ``source``, which are this rank's own, into the host pool's slots that ``target``
    names, and lease those."""

    source: Ticket
    target: Ticket


@dataclass
class Load:
    """Read tokens of a ticket: per KV cache group a range, into blocks that begin with the one of the first token. With
    a ``problem`` it only fails, saying so."""

    request_id: str
    ticket: Ticket | None
    block_ids: tuple[list[int], ...]
    tokens: tuple[tuple[int, int], ...]
    problem: str = ""
    follow: bool = False
    """The ticket's lease grows while it is read."""
    prefix: bool = False
    """It is what an earlier turn left, and may be gone by now."""


@dataclass(frozen=True)
class Growth:
    """A growing lease has the ticket's blocks, of which the first ``tokens`` per group may be read."""

    ticket: Ticket
    tokens: tuple[int, ...]
    complete: bool


@dataclass
class StepOrders(KVConnectorMetadata):
    """Orders of one step, to be applied in this order, each exactly once. The first list ends leases whose blocks
    somebody may overwrite in this very step."""

    instance: tuple[KVLayout, ...] = ()
    """Once, when they are known: the layouts of all ranks of this instance."""
    idle: bool = False
    """Nothing is computed in this step, nor was in the last ones that may still be under way."""
    waiting: bool = False
    """A request waits for its prefill to be scheduled elsewhere."""
    ends: list[tuple[int, int, str, bool]] = field(default_factory=list)
    """(lease, epoch, reason, will it be granted again?)."""
    grants: list[tuple[str, Ticket, bool]] = field(default_factory=list)
    """(request, ticket, does it grow?)."""
    ready: list[Growth] = field(default_factory=list)
    """What may be read now, and ``computing`` what may be once this step is computed."""
    computing: list[Growth] = field(default_factory=list)
    completes: list[str] = field(default_factory=list)
    """Prefills whose prompt is computed when this step is."""
    saves: list[Save] = field(default_factory=list)
    pool_ends: list[tuple[int, str]] = field(default_factory=list)
    """(lease of the host pool, reason); before ``saves``, which may use the same slots."""
    closes: list[int] = field(default_factory=list)
    """Growing leases whose request has ended: its blocks are free when the lease ends, or has ended."""
    drops: list[int] = field(default_factory=list)
    """Growing leases whose request ended otherwise: nobody waits for them."""
    extends: list[int] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
