"""The ticket: what travels with a request so that a reader finds the leased blocks. It is not trusted: what it says of
the lease (which blocks in which order, how many tokens, under which key) the owner compares by its digest, the *terms*,
before it confirms anything."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from pd_connector.errors import LocalProtocolError, RemoteProtocolError
from pd_connector.protocol.messages import TERMS_BYTES, U32, U64, Capability, Name

MAX_BLOCKS = 2**20
MAX_KEY_BYTES = 64
MAX_MARKS = 64
ADDRESS = re.compile(r"tcp://[^\s#/]+:\d{1,5}(#[0-9a-f]{64})?")


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """``address`` and ``incarnation`` name the agent that speaks for the owner, ``blocks`` the owner's block ids per KV
    cache group, ``tokens`` how many tokens of KV they hold and ``key`` the canonical prefix key of those tokens
    (cache.prefix), empty when the engine has no use for it. ``marks`` are the keys of shorter prefixes, (tokens, key),
    for a reader whose own tokens may differ somewhere."""

    address: Name
    incarnation: U64
    lease: U64
    epoch: U32
    capability: Capability
    blocks: Annotated[
        tuple[Annotated[tuple[U32, ...], Meta(max_length=MAX_BLOCKS)], ...], Meta(min_length=1, max_length=64)
    ]
    tokens: U32 = 0
    key: Annotated[bytes, Meta(max_length=MAX_KEY_BYTES)] = b""
    marks: Annotated[
        tuple[tuple[U32, Annotated[bytes, Meta(max_length=MAX_KEY_BYTES)]], ...], Meta(max_length=MAX_MARKS)
    ] = ()

    def __repr__(self) -> str:  # capabilities stay out of logs
        owner = f"{self.incarnation:016x} at {self.address}"
        return f"Ticket(lease {self.lease}.{self.epoch} of {owner}, {self.tokens} tokens)"

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    def arrays(self) -> tuple[npt.NDArray[np.uint32], ...]:
        """``blocks`` as arrays, the one look at every id that a transfer takes. Raises LocalProtocolError."""
        try:
            return tuple(np.array(group, np.uint32) for group in self.blocks)
        except (OverflowError, TypeError, ValueError) as error:
            raise LocalProtocolError(f"a ticket's blocks must be whole numbers in 0..2**32-1: {error}") from None

    def terms(self, arrays: Sequence[npt.NDArray[np.uint32]] | None = None) -> bytes:
        """16 bytes that differ when blocks, their order, tokens, key or marks do. ``arrays`` where known already."""
        digest = hashlib.blake2b(digest_size=TERMS_BYTES)
        digest.update(self.tokens.to_bytes(4, "little") + len(self.key).to_bytes(1, "little") + self.key)
        for tokens, key in self.marks:
            digest.update(tokens.to_bytes(4, "little") + len(key).to_bytes(1, "little") + key)
        for group in self.arrays() if arrays is None else arrays:
            digest.update(len(group).to_bytes(4, "little") + group.astype("<u4", copy=False).tobytes())
        return digest.digest()

    def with_blocks(self, *groups: Sequence[int]) -> Ticket:
        """The same ticket with these block ids per KV cache group: what a growing lease has by now."""
        return msgspec.structs.replace(self, blocks=tuple(tuple(int(block) for block in ids) for ids in groups))

    def check(self) -> None:
        """Raises LocalProtocolError for values that no reader would take, which making a ticket does not look at."""
        if not 0 <= self.tokens < 2**32 or len(self.key) > MAX_KEY_BYTES:
            raise LocalProtocolError(f"a ticket of {self.tokens} tokens with a key of {len(self.key)} bytes cannot be")

    @classmethod
    def from_bytes(cls, data: bytes) -> Ticket:
        """Raises RemoteProtocolError when the bytes are not a ticket."""
        try:
            ticket = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RemoteProtocolError(f"not a ticket: {error}; take it unchanged from the owner's answer") from None
        if not ADDRESS.fullmatch(ticket.address):
            raise RemoteProtocolError(f"not a ticket: {ticket.address!r} is not tcp://HOST:PORT or tcp://HOST:PORT#KEY")
        return ticket
