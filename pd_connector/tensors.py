"""Tensors and arrays → regions, grids and layouts, by duck typing: torch is never imported.

A tensor is anything with ``data_ptr``, ``stride``, ``shape``, ``element_size`` and ``untyped_storage`` (torch), or with
``__array_interface__`` (numpy). Its first axis counts blocks; the other axes may be permuted in memory but must fill
the block densely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pd_connector.errors import LocalProtocolError
from pd_connector.layout import Form, GroupLayout, KVLayout, Part
from pd_connector.memory import UNKNOWN, BlockGrid, GridRef, MemoryKind, Region


@dataclass(frozen=True, slots=True)
class _Described:
    """Sizes and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    storage: tuple[int, int]
    kind: MemoryKind
    owner: Any
    writable: bool = True
    device: int = UNKNOWN


def to_regions(layers: Mapping[str, Any] | Sequence[Any], groups: Mapping[str, int] | None = None) -> list[Region]:
    """Regions, one per distinct storage, for ``layers``: name → tensor, or name → (tensor, tensor, ...) for K/V parts.
    Tensors of any types may share a storage, and grids of several groups its bytes: a block belongs to one of them.

    The layer index of a grid is the layer's position. ``groups`` gives a layer's KV cache group (default 0). Raises
    LocalProtocolError for a tensor whose blocks are not dense or overlap.
    """
    named = layers if isinstance(layers, Mapping) else {f"layer.{i}": tensor for i, tensor in enumerate(layers)}
    grids: dict[tuple[int, int], list[BlockGrid]] = {}
    first: dict[tuple[int, int], _Described] = {}
    for index, (name, value) in enumerate(named.items()):
        for tensor in value if isinstance(value, tuple | list) else (value,):
            described = _describe(tensor, name)
            grid = _grid(described, name, index, (groups or {}).get(name, 0))
            grids.setdefault(described.storage, []).append(grid)
            first.setdefault(described.storage, described)
    return [_region(one, grids[storage]) for storage, one in first.items()]


def _region(first: _Described, grids: Sequence[BlockGrid]) -> Region:
    """Of host memory all that was allocated together; of a device's what the grids cover, since engines align tensors
    that are to be registered (to 2 MiB for an Ascend NPU) inside of larger allocations."""
    address, length = first.storage
    if first.kind is not MemoryKind.HOST:
        before, end = min(grid.offset for grid in grids), max(grid.end for grid in grids)
        address, length = address + before, end - before
        grids = [replace(grid, offset=grid.offset - before) for grid in grids]
    return Region(address, length, tuple(grids), first.kind, first.owner, first.writable, device=first.device)


def describe_grids(grids: Sequence[GridRef], *, dtype: str = "uint8") -> KVLayout:
    """The layout of plain byte grids, for engines whose blocks carry no finer structure: only whole blocks of equal
    size are exchanged."""
    by_group: dict[int, dict[int, list[BlockGrid]]] = {}
    for ref in grids:
        by_group.setdefault(ref.grid.group, {}).setdefault(ref.grid.layer, []).append(ref.grid)
    groups = []
    for _, layers in sorted(by_group.items()):
        forms = {layer: _opaque(parts) for layer, parts in layers.items()}
        every = tuple(dict.fromkeys(forms.values()))
        groups.append(
            GroupLayout(
                kind="full",
                block_tokens=1,
                dtype=dtype,
                layers=tuple(f"layer.{layer}" for layer in layers),
                forms=every,
                form_of=tuple(every.index(form) for form in forms.values()),
            )
        )
    return KVLayout(platform="plain bytes", groups=tuple(groups))


def _opaque(grids: Sequence[BlockGrid]) -> Form:
    sizes = tuple(grid.block_bytes for grid in grids)
    parts = (
        Part(name=f"bytes.{index}", grid=index, unit_bytes=size, token_stride=size) for index, size in enumerate(sizes)
    )
    return Form(block_bytes=sizes, parts=tuple(parts))


def check_layout(layout: KVLayout, grids: Sequence[GridRef]) -> None:
    """Raises LocalProtocolError unless a layout is one of these grids."""
    named = [(group, size) for group, one in enumerate(layout.groups) for size in one.grid_bytes]
    there = [(ref.grid.group, ref.grid.block_bytes) for ref in grids]
    if named != there:
        raise LocalProtocolError(
            f"the layout describes {len(named)} grids of {len(layout.groups)} groups, which are not the {len(there)} "
            "registered ones in canonical order (group, layer)"
        )


def _describe(tensor: Any, name: str) -> _Described:
    if hasattr(tensor, "data_ptr"):
        itemsize = int(tensor.element_size())
        storage = tensor.untyped_storage()
        return _Described(
            address=int(tensor.data_ptr()),
            shape=tuple(int(n) for n in tensor.shape),
            strides=tuple(int(n) * itemsize for n in tensor.stride()),
            itemsize=itemsize,
            storage=(int(storage.data_ptr()), int(storage.nbytes())),
            kind=_kind(str(tensor.device.type), name),
            owner=tensor,
            device=UNKNOWN if tensor.device.index is None else int(tensor.device.index),
        )
    if hasattr(tensor, "__array_interface__"):
        base = tensor
        while getattr(base, "base", None) is not None and hasattr(base.base, "__array_interface__"):
            base = base.base
        return _Described(
            address=int(tensor.__array_interface__["data"][0]),
            writable=not tensor.__array_interface__["data"][1],
            shape=tuple(tensor.shape),
            strides=tuple(tensor.strides),
            itemsize=int(tensor.itemsize),
            storage=(int(base.__array_interface__["data"][0]), int(base.nbytes)),
            kind=MemoryKind.HOST,
            owner=base,
        )
    raise LocalProtocolError(f"layer {name}: {type(tensor).__name__} is neither a tensor nor an array")


def _kind(device: str, name: str) -> MemoryKind:
    try:
        return MemoryKind({"cpu": "host"}.get(device, device))
    except ValueError:
        known = ", ".join(kind.value for kind in MemoryKind)
        raise LocalProtocolError(f"layer {name}: memory of device {device!r} is not supported ({known})") from None


def _grid(tensor: _Described, name: str, layer: int, group: int) -> BlockGrid:
    if len(tensor.shape) < 2 or 0 in tensor.shape:
        raise LocalProtocolError(f"layer {name}: shape {tensor.shape} has no (blocks, ...) axes")
    inner = sorted(zip(tensor.strides[1:], tensor.shape[1:], strict=True))
    dense = tensor.itemsize
    for stride, extent in inner:
        if extent != 1 and stride != dense:
            raise LocalProtocolError(
                f"layer {name}: shape {tensor.shape} with byte strides {tensor.strides}: the blocks are not dense"
            )
        dense *= extent
    stride = tensor.strides[0] if tensor.shape[0] > 1 else dense
    return BlockGrid(group, layer, tensor.address - tensor.storage[0], stride, dense, tensor.shape[0])
