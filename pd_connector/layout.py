"""KVLayout: what one rank's KV cache looks like, independent of where it lies.

A rank states which layers and which KV heads it holds and how the bytes of a block are arranged. Two ranks need not be
alike: ``diff`` between their layouts is empty when blocks can be exchanged, whatever their parallel sizes, block sizes
and axis orders; reshard.py then says which bytes go where. The fingerprint covers everything that gives bytes their
meaning and leaves out what does not (addresses, number of blocks).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from pd_connector.errors import LayoutMismatch

Name = Annotated[str, Meta(max_length=256)]
Size = Annotated[int, Meta(ge=0, le=2**53)]
Count = Annotated[int, Meta(ge=1, le=2**20)]

MAX_PHASES = 64
"""Bound on the ways in which blocks of two sizes can lie over each other; 16 and 128 tokens have 8."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What blocks hold of one kind of content: heads × units of tokens × chunks of ``unit_bytes``, which are never cut.

    Parts of one ``name`` ("k", "v", "latent", "scale", "state", ...) are exchanged. ``grid`` counts the layer's grids,
    ``offset`` is where the part starts in a block of it. A unit is what ``unit_tokens`` consecutive tokens of one head
    hold in one chunk; ``chunks`` is above 1 where the bytes of a head and token do not lie together. Strides are bytes
    from one head, unit of tokens or chunk to the next. ``packing`` names how a unit is packed inside, empty for plain
    channels; two equal strings promise interchangeable units.
    """

    name: Name
    grid: Annotated[int, Meta(ge=0, lt=64)] = 0
    offset: Size = 0
    unit_tokens: Count = 1
    unit_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    token_stride: Size
    chunks: Count = 1
    chunk_stride: Size = 0
    head_stride: Size = 0
    packing: Name = ""


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """The inside of a layer's blocks: ``block_bytes`` of each of its grids and the parts that lie in them."""

    block_bytes: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=64)]
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=64)]


class GroupLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One KV cache group of a rank.

    ``kind`` names the attention type ("full", "sliding_window", ...), ``block_tokens`` the tokens per block (1 where a
    block is a state, not tokens). Of the model's ``total_heads`` KV heads this rank holds ``heads`` from ``first_head``
    on; what every rank holds alike (a latent) counts as one head. ``layers`` are the layer names in model order, and
    ``form_of`` the index in ``forms`` of each.
    """

    kind: Name
    block_tokens: Count
    heads: Count = 1
    first_head: Annotated[int, Meta(ge=0, le=2**20)] = 0
    total_heads: Count = 1
    dtype: Name
    layers: Annotated[tuple[Name, ...], Meta(max_length=4096)]
    forms: Annotated[tuple[Form, ...], Meta(max_length=64)]
    form_of: Annotated[tuple[Annotated[int, Meta(ge=0, lt=64)], ...], Meta(max_length=4096)]

    def __post_init__(self) -> None:
        if len(self.form_of) != len(self.layers) or any(form >= len(self.forms) for form in self.form_of):
            raise ValueError(f"{len(self.layers)} layers need the index of a form each")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("two layers have one name")
        if self.first_head + self.heads > self.total_heads:
            raise ValueError(f"heads {self.first_head} to {self.first_head + self.heads - 1} of {self.total_heads}")
        for form in self.forms:
            if not form.parts or len({part.name for part in form.parts}) < len(form.parts):
                raise ValueError("a form has parts, each with a name of its own")
            for part in form.parts:
                _check_part(part, form, self)

    @property
    def grid_bytes(self) -> tuple[int, ...]:
        """Bytes of one block in each grid of the group, in canonical grid order."""
        return tuple(size for form in self.form_of for size in self.forms[form].block_bytes)

    def form(self, layer: int) -> Form:
        return self.forms[self.form_of[layer]]


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The layout of one rank, number ``rank`` of the ``ranks`` of its instance. ``platform`` is for people: what
    arranged the blocks."""

    platform: Name = ""
    rank: Size = 0
    ranks: Annotated[int, Meta(ge=1, le=4096)] = 1
    groups: Annotated[tuple[GroupLayout, ...], Meta(max_length=64)]

    def fingerprint(self) -> str:
        """128-bit hex digest of everything that gives bytes their meaning, but the rank number."""
        body = msgspec.msgpack.encode([self.ranks, self.groups])
        return hashlib.blake2b(body, digest_size=16).hexdigest()

    def diff(self, other: KVLayout) -> list[str]:
        """Differences that forbid an exchange, in words; "ours" is ``self``. Empty when blocks can be exchanged."""
        if len(self.groups) != len(other.groups):
            return [f"KV cache groups: ours {_kinds(self)}, theirs {_kinds(other)}"]
        out: list[str] = []
        for index, (a, b) in enumerate(zip(self.groups, other.groups, strict=True)):
            out.extend(f"group {index} {line}" for line in _diff_group(a, b))
        return out

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of a group over all its layers on this rank."""
        return sum(self.groups[group].grid_bytes)


def heads_of_rank(total: int, ranks: int, rank: int) -> tuple[int, int]:
    """(first head, heads) of a tensor-parallel rank, as engines divide them: evenly, or replicated where there are more
    ranks than heads. Raises LayoutMismatch where neither comes out even."""
    if total < 1 or not 0 <= rank < ranks:
        raise LayoutMismatch(f"rank {rank} of {ranks} cannot hold any of {total} KV heads")
    if total % ranks == 0:
        each = total // ranks
        return rank * each, each
    if ranks % total == 0:
        return rank * total // ranks, 1
    raise LayoutMismatch(f"{total} KV heads cannot be divided among {ranks} ranks, nor each be replicated equally")


def strided_parts(
    axes: Mapping[str, tuple[int, int]], itemsize: int, *, name: str = "kv", grid: int = 0, packing: str = ""
) -> tuple[Part, ...]:
    """Parts of a block whose elements lie by (extent, byte stride) of the axes "kv", "head", "token", "channel".

    An axis "kv" of extent 2 gives the parts "k" and "v"; without one there is a single part called ``name``."""
    extent, stride = axes["channel"]
    together = stride == itemsize or extent == 1
    both = axes.get("kv")
    names = (("k", 0), ("v", both[1])) if both is not None and both[0] == 2 else ((name, 0),)
    return tuple(
        Part(
            name=each,
            grid=grid,
            offset=offset,
            unit_bytes=extent * itemsize if together else itemsize,
            token_stride=axes["token"][1],
            chunks=1 if together else extent,
            chunk_stride=0 if together else stride,
            head_stride=axes["head"][1] if "head" in axes else 0,
            packing=packing,
        )
        for each, offset in names
    )


def phases(ours: int, theirs: int) -> int:
    """In how many ways blocks of two sizes lie over each other."""
    both = math.lcm(ours, theirs)
    return both // ours + both // theirs - 1


def _check_part(part: Part, form: Form, group: GroupLayout) -> None:
    sizes = (part.grid, part.offset, part.token_stride, part.chunk_stride, part.head_stride)
    counts = (part.unit_tokens, part.unit_bytes, part.chunks)
    if any(type(size) is not int for size in sizes + counts) or min(sizes) < 0 or min(counts) < 1:
        raise ValueError(f"part {part.name!r}: sizes are whole numbers, and none is negative")
    if part.grid >= len(form.block_bytes) or group.block_tokens % part.unit_tokens:
        raise ValueError(f"part {part.name!r} has no grid, or units that do not fill blocks")
    units = group.block_tokens // part.unit_tokens
    last = (
        (group.heads - 1) * part.head_stride + (units - 1) * part.token_stride + (part.chunks - 1) * part.chunk_stride
    )
    if part.offset + last + part.unit_bytes > form.block_bytes[part.grid]:
        raise ValueError(f"part {part.name!r} does not lie in a block of {form.block_bytes[part.grid]} bytes")


def _kinds(layout: KVLayout) -> str:
    kinds = [f"{group.kind} of {len(group.layers)} layers" for group in layout.groups]
    return f"{len(kinds)} ({', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''})"


def _diff_group(a: GroupLayout, b: GroupLayout) -> list[str]:
    out: list[str] = []
    if not a.layers or not b.layers:  # a pipeline stage may have none of them
        return out
    for field, words in (("kind", "attention kind"), ("total_heads", "KV heads of the model"), ("dtype", "dtype")):
        ours, theirs = getattr(a, field), getattr(b, field)
        if ours != theirs:
            out.append(f"{words}: ours {ours!r}, theirs {theirs!r}")
    if phases(a.block_tokens, b.block_tokens) > MAX_PHASES:
        out.append(f"block size in tokens: ours {a.block_tokens}, theirs {b.block_tokens}, with too few common bounds")
    theirs_of = {layer: b.form(index) for index, layer in enumerate(b.layers)}
    pairs = {(a.form(index), theirs_of[layer]) for index, layer in enumerate(a.layers) if layer in theirs_of}
    for mine, other in sorted(pairs, key=str):
        out.extend(line for line in _diff_form(mine, other) if line not in out)
    if a.block_tokens != b.block_tokens and any("packed as" in line for line in out):
        out.append(f"block size in tokens: ours {a.block_tokens}, theirs {b.block_tokens}")
    return out


def _diff_form(a: Form, b: Form) -> list[str]:
    ours, theirs = ({part.name: part for part in form.parts} for form in (a, b))
    if ours.keys() != theirs.keys():
        return [f"blocks hold: ours {', '.join(sorted(ours))}, theirs {', '.join(sorted(theirs))}"]
    return [
        f"{name} is packed as: ours {_packed(part)}, theirs {_packed(theirs[name])}"
        for name, part in ours.items()
        if meaning(part) != meaning(theirs[name])
    ]


def meaning(part: Part) -> tuple[int, int, int, str]:
    """What two parts must have in common."""
    return part.unit_tokens, part.unit_bytes, part.chunks, part.packing


def _packed(part: Part) -> str:
    tokens = "1 token" if part.unit_tokens == 1 else f"{part.unit_tokens} tokens"
    chunks = f" in {part.chunks} chunks" if part.chunks > 1 else ""
    return f"{part.unit_bytes} bytes per {tokens}{chunks}" + (f" ({part.packing})" if part.packing else "")
