"""What lies where inside the blocks of a layer: vLLM's tensors, attention backends and CPU packings as layout parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pd_connector.layout import Form, Part, strided_parts

_ORDERS = (
    ("kv", "token", "head", "channel"),
    ("kv", "head", "token", "channel"),
    ("head", "token", "channel"),
    ("token", "head", "channel"),
    ("token", "channel"),
)
"""Logical axes of a block, as vLLM's backends have named them from 0.23 on (0.32: always heads, tokens, content)."""
_TUPLE_ORDERS = (("token", "head", "channel"), ("token", "channel"))
"""Of one tensor of several, as vllm-ascend gives a layer: (k, v) or (nope, rope), the indexer's k and its scale."""


@dataclass(frozen=True)
class Content:
    """What a layer's blocks hold on this rank. ``packing`` names the instruction set that packs blocks on a CPU,
    ``dtype`` the type of the layer's cache: a tensor of another one says so, or int8 would be taken for float8."""

    heads: int
    tokens: int
    dtype: str
    latent: bool = False
    packing: str = ""


def form_of(tensors: Sequence[Any], content: Content) -> Form:
    """The inside of the blocks of a layer that has these tensors (first axis: blocks; one grid each)."""
    parts: list[Part] = []
    for grid, tensor in enumerate(tensors):
        if content.packing and len(tensors) == 1:
            parts += _packed(tensor, content)
        else:
            parts += _plain(tensor, grid, len(tensors), content)
    return Form(block_bytes=tuple(_block_bytes(tensor) for tensor in tensors), parts=tuple(parts))


def state_form(tensors: Sequence[Any], packing: str) -> Form:
    """Of a layer whose blocks are states, not tokens: each tensor's block is a whole."""
    sizes = tuple(_block_bytes(tensor) for tensor in tensors)
    parts = tuple(
        Part(
            name=f"state.{grid}", grid=grid, unit_bytes=size, token_stride=size, packing=f"{dtype_of(tensor)} {packing}"
        )
        for grid, (tensor, size) in enumerate(zip(tensors, sizes, strict=True))
    )  # fmt: skip
    return Form(block_bytes=sizes, parts=parts)


def dtype_of(holder: Any) -> str:
    """Of a tensor or a cache spec."""
    return str(getattr(holder, "dtype", "uint8")).removeprefix("torch.")


def _block_bytes(tensor: Any) -> int:
    size = int(tensor.element_size())
    for extent in tensor.shape[1:]:
        size *= int(extent)
    return size


def _plain(tensor: Any, grid: int, grids: int, content: Content) -> tuple[Part, ...]:
    axes = _axes(tensor, content, _ORDERS if grids == 1 else _TUPLE_ORDERS)
    if grids == 1:
        name = "latent" if content.latent else "kv"
    else:
        name = f"latent.{grid}" if content.latent else "kv"[grid] if grids == 2 else f"kv.{grid}"
    if axes is None:  # arranged in a way that is not known here: blocks of equal shape can still be exchanged
        size = _block_bytes(tensor)
        strides = [int(stride) for stride in tensor.stride()]
        packing = f"{dtype_of(tensor)} shape {tuple(tensor.shape[1:])} strides {tuple(strides[1:])}"
        return (
            Part(
                name=name,
                grid=grid,
                unit_tokens=content.tokens,
                unit_bytes=size,
                token_stride=size,
                packing=packing,
            ),
        )
    if name == "kv" and axes["channel"][0] % 2 == 0 and "kv" not in axes:
        axes = _split_channel(axes)  # every token and head holds [K | V]
    packing = "" if dtype_of(tensor) == content.dtype else dtype_of(tensor)
    return strided_parts(axes, int(tensor.element_size()), name=name, grid=grid, packing=packing)


def _axes(tensor: Any, content: Content, orders: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]] | None:
    """(extent, byte stride) of each axis of a block."""
    size, shape = int(tensor.element_size()), [int(extent) for extent in tensor.shape[1:]]
    strides = [int(stride) * size for stride in tensor.stride()[1:]]
    wanted = {"kv": 2, "head": content.heads, "token": content.tokens}
    seen = [(shape, strides)]
    if len(shape) > 2 and shape[0] * shape[1] == content.tokens and strides[0] == shape[1] * strides[1]:
        # The kernel's smaller blocks, one behind the other: their tokens are the block's.
        seen.append(([content.tokens, *shape[2:]], strides[1:]))
    for extents, steps in seen:
        for order in orders:
            named = dict(zip(order, zip(extents, steps, strict=False), strict=False))
            if len(order) == len(extents) and all(n == wanted.get(axis, n) for axis, (n, _) in named.items()):
                return named
    return None


def _split_channel(axes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    extent, stride = axes["channel"]
    return {**axes, "kv": (2, extent // 2 * stride), "channel": (extent // 2, stride)}


def _packed(tensor: Any, content: Content) -> tuple[Part, ...]:
    """A block (heads, tokens, 2 x head size) on a CPU: all K, then all V of each head, each packed by instruction set.

    vLLM's csrc/cpu: "amx" has K as [token / 16][channel / 2][16][2] and V as [channel / 16][token / 2][16][2]; "vec"
    has K as [channel][token] and V as [token][channel]. Of other sets only whole heads are exchanged."""
    size, shape = int(tensor.element_size()), [int(extent) for extent in tensor.shape[1:]]
    tokens, dim = content.tokens, shape[-1] // 2
    half = tokens * dim * size
    known = len(shape) == 3 and shape[:2] == [content.heads, tokens] and size == 2
    if known and content.packing == "amx" and not dim % 16 and not tokens % 16:
        k, v = 16 * dim * size, 2 * 16 * size
        return (
            _part("k", content, 0, half, unit_tokens=16, unit_bytes=k, token_stride=k),
            _part(
                "v", content, half, half, unit_tokens=2, unit_bytes=v, token_stride=v, chunks=dim // 16,
                chunk_stride=tokens // 2 * v,
            ),
        )  # fmt: skip
    if known and content.packing == "vec":
        return (
            _part(
                "k", content, 0, half, unit_bytes=size, token_stride=size, chunks=dim, chunk_stride=tokens * size
            ),
            _part("v", content, half, half, unit_bytes=dim * size, token_stride=dim * size),
        )  # fmt: skip
    whole = _block_bytes(tensor) // content.heads
    if len(shape) == 4:  # several of the kernel's blocks make one
        each = whole // shape[0]
        return (
            Part(
                name="kv", unit_tokens=tokens // shape[0], unit_bytes=each, token_stride=each * content.heads,
                head_stride=each, packing=content.packing,
            ),
        )  # fmt: skip
    return (
        Part(
            name="kv", unit_tokens=tokens, unit_bytes=whole, token_stride=whole, head_stride=whole,
            packing=content.packing,
        ),
    )  # fmt: skip


def _part(name: str, content: Content, offset: int, half: int, **fields: int) -> Part:
    return Part(name=name, offset=offset, head_stride=2 * half, packing=content.packing, **fields)
