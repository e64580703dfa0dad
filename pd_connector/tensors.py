"""Tensors and arrays → regions, grids and layouts, by duck typing: torch is never imported.

A tensor is anything with ``data_ptr``, ``stride``, ``shape``, ``element_size`` and ``untyped_storage`` (torch), or with
``__array_interface__`` (numpy). Its first axis counts blocks; the other axes may be permuted in memory but must fill
the block densely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pd_connector.errors import LocalProtocolError
from pd_connector.layout import GroupLayout, KVLayout
from pd_connector.memory import BlockGrid, GridRef, MemoryKind, Region


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


def to_regions(layers: Mapping[str, Any] | Sequence[Any], groups: Mapping[str, int] | None = None) -> list[Region]:
    """Regions, one per distinct storage, for ``layers``: name → tensor, or name → (tensor, tensor, ...) for K/V parts.

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
    return [
        Region(*storage, tuple(grids[storage]), one.kind, one.owner, one.writable) for storage, one in first.items()
    ]


def describe_grids(grids: Sequence[GridRef], packing: str, *, block_tokens: int = 1, dtype: str = "uint8") -> KVLayout:
    """The layout of plain byte grids, for engines whose blocks carry no finer structure."""
    by_group: dict[int, list[GridRef]] = {}
    for ref in grids:
        by_group.setdefault(ref.grid.group, []).append(ref)
    groups = tuple(
        GroupLayout(
            kind="full",
            block_tokens=block_tokens,
            heads=0,
            head_dim=0,
            dtype=dtype,
            layers=tuple(dict.fromkeys(f"layer.{ref.grid.layer}" for ref in refs)),
            part_bytes=tuple(ref.grid.block_bytes for ref in refs),
        )
        for _, refs in sorted(by_group.items())
    )
    return KVLayout(packing=packing, groups=groups)


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
