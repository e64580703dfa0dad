"""Instances of every division with known KV, the slow and obvious way of moving it, and a plain executor of plans."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pd_connector.layout import Form, GroupLayout, KVLayout, Part, heads_of_rank, strided_parts
from pd_connector.memory import BlockGrid, Region
from pd_connector.plan import CopyPlan, Dim

Bytes = npt.NDArray[np.uint8]

ORDERS = {
    "head-major": ("head", "token", "channel"),
    "token-major": ("token", "head", "channel"),
    "transposed": ("head", "channel", "token"),
}


@dataclass(frozen=True)
class Style:
    """How an instance arranges blocks. ``kv``: "split" into two grids, or an axis of one grid: "outer" (first), "inner"
    (beside the channel), "head" (within a head); "latent": one part that every rank holds."""

    order: str = "head-major"
    kv: str = "outer"
    block_tokens: int = 16

    def axes(self) -> list[tuple[str, ...]]:
        """Axes of each grid's blocks, outermost first."""
        order = ORDERS[self.order]
        if self.kv == "latent":
            return [("token", "channel")]
        if self.kv == "split":
            return [order, order]
        if self.kv == "outer":
            return [("kv", *order)]
        at = order.index("channel") if self.kv == "inner" else order.index("head") + 1
        return [(*order[:at], "kv", *order[at:])]


@dataclass
class Rank:
    """One rank: its layout and, per (layer, grid), an array (blocks, block bytes) and its logical view."""

    layout: KVLayout
    grids: list[Bytes] = field(default_factory=list)
    views: dict[str, list[Bytes]] = field(default_factory=dict)
    """Per layer: (kv, block, head, token, channel) views, one per "kv" content."""

    def regions(self) -> list[Region]:
        """One per grid, as different allocations would be."""
        per_layer = len(self.grids) // len(self.views)
        return [
            Region(
                grid.ctypes.data,
                grid.nbytes,
                (BlockGrid(0, index // per_layer, 0, grid.shape[1], grid.shape[1], grid.shape[0]),),
                keepalive=grid,
            )
            for index, grid in enumerate(self.grids)
        ]


@dataclass(frozen=True)
class Shape:
    """A model's KV: all in one group."""

    heads: int = 4
    layers: int = 2
    channels: int = 2


def instance(shape: Shape, style: Style, tp: int, pp: int, blocks: int) -> list[Rank]:
    """All ranks, with zeroed memory. Raises LayoutMismatch where heads cannot be divided."""
    return [
        _rank(shape, style, tp, stage * tp + t, _stage_layers(shape.layers, pp, stage), blocks, tp * pp)
        for stage in range(pp)
        for t in range(tp)
    ]


def _stage_layers(layers: int, pp: int, stage: int) -> tuple[str, ...]:
    bounds = np.linspace(0, layers, pp + 1).astype(int)
    return tuple(f"layer.{index}" for index in range(bounds[stage], bounds[stage + 1]))


def _rank(shape: Shape, style: Style, tp: int, rank: int, layers: tuple[str, ...], blocks: int, ranks: int) -> Rank:
    latent = style.kv == "latent"
    total = 1 if latent else shape.heads
    first, heads = heads_of_rank(total, tp, rank % tp)
    extents = {"kv": 2, "head": heads, "token": style.block_tokens, "channel": shape.channels}
    parts: list[Part] = []
    sizes = []
    for grid, axes in enumerate(style.axes()):
        size, strides = 1, {}
        for axis in reversed(axes):
            strides[axis] = (extents[axis], size)
            size *= extents[axis]
        name = "latent" if latent else "kv"[grid] if style.kv == "split" else "kv"
        parts += strided_parts(strides, 1, name=name, grid=grid)
        sizes.append(size)
    group = GroupLayout(
        kind="full",
        block_tokens=style.block_tokens,
        heads=heads,
        first_head=first,
        total_heads=total,
        dtype="uint8",
        layers=layers,
        forms=(Form(block_bytes=tuple(sizes), parts=tuple(parts)),),
        form_of=(0,) * len(layers),
    )
    out = Rank(KVLayout(rank=rank, ranks=ranks, groups=(group,)))
    for layer in layers:
        out.views[layer] = []
        for axes in style.axes():
            array = np.zeros((blocks, *(extents[axis] for axis in axes)), np.uint8)
            out.grids.append(array.reshape(blocks, -1))
            named = {axis: 1 + index for index, axis in enumerate(axes)}
            wanted = [axis for axis in ("kv", "head", "token", "channel") if axis in named]
            view = array.transpose(
                *([named["kv"]] if "kv" in named else []), 0, *(named[a] for a in wanted if a != "kv")
            )
            if "kv" not in named:
                view = view[None]
            if "head" not in named:
                view = view[:, :, None]
            out.views[layer] += list(view)
    return out


def logical(shape: Shape, style: Style, tokens: int, seed: int = 0) -> Bytes:
    """What the model holds: (layer, kv, head, token, channel); no two neighbours alike, hardly any two at all."""
    kv, heads = (1, 1) if style.kv == "latent" else (2, shape.heads)
    return np.random.default_rng(seed).integers(1, 256, (shape.layers, kv, heads, tokens, shape.channels), np.uint8)


def write(ranks: list[Rank], kv: Bytes, ids: npt.NDArray[np.int64], first: int, last: int) -> None:
    """Put tokens ``first`` to ``last - 1`` where they belong, element by element: block ``ids[t // size]``."""
    tokens = np.arange(first, last)
    for rank in ranks:
        group = rank.layout.groups[0]
        blocks, places = ids[tokens // group.block_tokens], tokens % group.block_tokens
        for layer, views in rank.views.items():
            for content, view in enumerate(views):
                for head in range(group.heads):
                    view[blocks, head, places] = kv[int(layer.split(".")[1]), content, group.first_head + head, tokens]


def execute(plans: list[CopyPlan], source: Rank, target: Rank) -> None:
    """Carry plans out with nothing but index arithmetic."""
    for plan in plans:
        src_blocks, dst_blocks = plan.blocks(0).astype(np.int64), plan.blocks(1).astype(np.int64)
        for p in plan.patterns:
            src, dst = places(p.src_offset, p.run_bytes, p.dims, 1), places(p.dst_offset, p.run_bytes, p.dims, 2)
            target.grids[p.dst_grid][dst_blocks[:, None], dst] = source.grids[p.src_grid][src_blocks[:, None], src]


def places(offset: int, run: int, dims: tuple[Dim, ...], side: int) -> npt.NDArray[np.int64]:
    """Every byte of a pattern on one side (1: the source, 2: the destination), counted from its block's start."""
    at: npt.NDArray[np.int64] = np.array([offset])
    for dim in dims:
        at = (at[:, None] + np.arange(dim[0]) * dim[side]).reshape(-1)
    out: npt.NDArray[np.int64] = (at[:, None] + np.arange(run)).reshape(-1)
    return out
