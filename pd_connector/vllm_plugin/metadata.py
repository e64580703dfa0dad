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


@dataclass
class Load:
    """Read tokens of a ticket: per KV cache group a range, into blocks that begin with the one of the first token. With
    a ``problem`` it only fails, saying so."""

    request_id: str
    ticket: Ticket | None
    block_ids: tuple[list[int], ...]
    tokens: tuple[tuple[int, int], ...]
    problem: str = ""


@dataclass
class StepOrders(KVConnectorMetadata):
    """Orders of one step, to be applied in this order, each exactly once. The first list ends leases whose blocks
    somebody may overwrite in this very step."""

    instance: tuple[KVLayout, ...] = ()
    """Once, when they are known: the layouts of all ranks of this instance."""
    idle: bool = False
    """Nothing is computed in this step, nor was in the last ones that may still be under way."""
    ends: list[tuple[int, str]] = field(default_factory=list)
    grants: list[tuple[str, Ticket]] = field(default_factory=list)
    extends: list[int] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
