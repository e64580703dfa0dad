"""The ticket: what travels with a request so that a reader finds the leased blocks. It is not trusted: the owner checks
every field against its own lease table."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.messages import U32, U64, Capability, Name

MAX_BLOCKS = 2**20


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """``address`` and ``incarnation`` name the agent that speaks for the owner, ``blocks`` the owner's block ids per KV
    cache group, ``tokens`` how many tokens of KV they hold and ``key`` the canonical prefix key of those tokens
    (cache.prefix), empty when the engine has no use for it."""

    address: Name
    incarnation: U64
    lease: U64
    epoch: U32
    capability: Capability
    blocks: Annotated[
        tuple[Annotated[tuple[U32, ...], Meta(max_length=MAX_BLOCKS)], ...], Meta(min_length=1, max_length=64)
    ]
    tokens: U32 = 0
    key: Annotated[bytes, Meta(max_length=64)] = b""

    def __repr__(self) -> str:  # capabilities stay out of logs
        owner = f"{self.incarnation:016x} at {self.address}"
        return f"Ticket(lease {self.lease}.{self.epoch} of {owner}, {self.tokens} tokens)"

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Ticket:
        """Raises RemoteProtocolError when the bytes are not a ticket."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RemoteProtocolError(f"not a ticket: {error}; take it unchanged from the owner's answer") from None
