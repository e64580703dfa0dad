"""KVLayout: what one rank's KV cache looks like, independent of where it lies.

Two ranks exchange blocks only if ``diff`` between their layouts is empty. The fingerprint covers everything that gives
bytes their meaning (attention backend, interior packing, dtype, heads, ...) and leaves out what does not (addresses,
number of blocks).
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(max_length=256)]
Size = Annotated[int, Meta(ge=0, le=2**53)]


class GroupLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One KV cache group of a rank.

    ``kind`` names the attention type ("full", "sliding_window", ...), ``block_tokens`` the tokens per block,
    ``heads`` and ``head_dim`` this rank's KV heads (0 where the notion does not apply), ``layers`` the layer names in
    model order and ``part_bytes`` the bytes of one block in each grid of the group, in canonical grid order.
    """

    kind: Name
    block_tokens: Annotated[int, Meta(ge=1, le=2**20)]
    heads: Size
    head_dim: Size
    dtype: Name
    layers: Annotated[tuple[Name, ...], Meta(max_length=4096)]
    part_bytes: Annotated[tuple[Size, ...], Meta(max_length=16384)]


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The layout of one rank: its groups and how block interiors are packed.

    ``packing`` names everything that decides the meaning of bytes inside a block (attention backend, axis order,
    instruction set); two equal strings promise interchangeable bytes. ``ranks`` is the tensor-parallel size.
    """

    packing: Name
    rank: Size = 0
    ranks: Annotated[int, Meta(ge=1, le=65536)] = 1
    groups: Annotated[tuple[GroupLayout, ...], Meta(max_length=64)]

    def fingerprint(self) -> str:
        """128-bit hex digest of everything but the rank number."""
        body = msgspec.msgpack.encode([self.packing, self.ranks, self.groups])
        return hashlib.blake2b(body, digest_size=16).hexdigest()

    def diff(self, other: KVLayout) -> list[str]:
        """Differences that forbid an exchange, in words; "ours" is ``self``. Empty when blocks can be exchanged."""
        out = []
        for field, words in (("packing", "block packing"), ("ranks", "tensor-parallel size"), ("rank", "rank")):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                out.append(f"{words}: ours {ours!r}, theirs {theirs!r}")
        if len(self.groups) != len(other.groups):
            out.append(f"KV cache groups: ours {len(self.groups)}, theirs {len(other.groups)}")
        for index, (a, b) in enumerate(zip(self.groups, other.groups, strict=False)):
            out.extend(f"group {index} {line}" for line in _diff_group(a, b))
        return out

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of a group over all its layers on this rank."""
        return sum(self.groups[group].part_bytes)


def _diff_group(a: GroupLayout, b: GroupLayout) -> list[str]:
    out = []
    for field, words in (
        ("kind", "attention kind"),
        ("block_tokens", "block size in tokens"),
        ("heads", "KV heads per rank"),
        ("head_dim", "head size"),
        ("dtype", "dtype"),
    ):
        ours, theirs = getattr(a, field), getattr(b, field)
        if ours != theirs:
            out.append(f"{words}: ours {ours!r}, theirs {theirs!r}")
    if a.layers != b.layers:
        missing = [name for name in a.layers if name not in b.layers]
        extra = [name for name in b.layers if name not in a.layers]
        out.append(
            f"layers: ours {len(a.layers)}, theirs {len(b.layers)}"
            + (f", missing there: {', '.join(missing[:3])}" if missing else "")
            + (f", only there: {', '.join(extra[:3])}" if extra else "")
            + ("" if missing or extra else ", in another order")
        )
    elif a.part_bytes != b.part_bytes:
        out.append(f"bytes per block: ours {_parts(a.part_bytes)}, theirs {_parts(b.part_bytes)}")
    return out


def _parts(sizes: tuple[int, ...]) -> str:
    """The total alone could be equal on both sides while the parts are not."""
    shown = " + ".join(map(str, sizes[:4]))
    return shown if len(sizes) <= 4 else f"{shown} + ... ({len(sizes)} parts, {sum(sizes)} in all)"
