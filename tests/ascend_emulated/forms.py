"""KV caches in the forms in which vllm-ascend hands them to a connector, on the emulated device. Not run on hardware:
the forms were read in its sources (0.23), the code here is ours.

One raw int8 allocation per cache or per part of one, aligned to 2 MiB inside of a larger one, viewed as several types;
the first axis counts the kernel's blocks of 128 tokens.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
)

from pd_connector.layout import KVLayout
from pd_connector.memory import Region
from pd_connector.vllm_plugin.identity import describe_caches

KERNEL = 128
"""Tokens in a block of the attention kernels."""
ALIGNMENT = 2 << 20
_SHIFT = 512
"""torch-npu's allocator hands out multiples of this: what is aligned is made so by the model runner."""
_POISON = 0x5A
"""What nothing was written to holds."""


class AscendMLAAttentionSpec(MLAAttentionSpec):
    """Named as vllm-ascend's, which derives it alike."""


@dataclass(frozen=True)
class Content:
    """One tensor of a layer: (head size, type). ``heads``: divided among the ranks, or held alike by all."""

    size: int
    dtype: torch.dtype
    divided: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of model. ``packed``: contents that share one allocation, from that index on. ``paged``: one allocation
    for everything, in which each block has its contents side by side."""

    contents: tuple[Content, ...]
    heads: int = 1
    layers: int = 2
    packed: int | None = None
    paged: bool = False

    @property
    def latent(self) -> bool:
        return not self.contents[0].divided


BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8
KINDS = {
    "k and v": Kind((Content(64, BF16, True), Content(64, BF16, True)), heads=4),
    "v of another size": Kind((Content(64, BF16, True), Content(32, BF16, True)), heads=4),
    "quantised k and v": Kind((Content(64, INT8, True), Content(64, INT8, True)), heads=4),
    "latent": Kind((Content(512, BF16), Content(64, BF16))),
    "sparse": Kind((Content(512, BF16), Content(64, BF16), Content(128, BF16))),
    "sparse, quantised": Kind((Content(512, BF16), Content(64, BF16), Content(128, INT8), Content(1, FP16)), packed=2),
    "sparse, three": Kind((Content(656, INT8), Content(128, INT8), Content(1, FP16)), packed=1),
    "compressed": Kind((Content(128, INT8), Content(1, FP16)), paged=True),
}


@dataclass
class Rank:
    """One rank's caches. ``tensors``: per layer (kernel blocks, 128, heads, size) views; ``raw``: the allocations."""

    layout: KVLayout
    regions: list[Region]
    tensors: dict[str, tuple[torch.Tensor, ...]]
    raw: list[torch.Tensor] = field(default_factory=list)

    def snapshot(self) -> list[bytes]:
        """Every byte of every allocation; of an emulated device the host can take them."""
        return [ctypes.string_at(raw.data_ptr(), raw.nbytes) for raw in self.raw]


def aligned(size: int, raws: list[torch.Tensor]) -> torch.Tensor:
    """Raw bytes as the model runner allocates them where KV is transferred."""
    whole = torch.empty(size + _SHIFT + ALIGNMENT, dtype=torch.int8, device="npu")
    ctypes.memset(whole.data_ptr(), _POISON, whole.nbytes)
    raws.append(whole)
    loose = whole[_SHIFT:]
    skip = -loose.data_ptr() % ALIGNMENT
    return loose[skip : skip + size]


def attention_rank(kind: Kind, tp: int, rank: int, blocks: int, block_tokens: int = KERNEL) -> Rank:
    """``blocks`` of the scheduler's blocks, each of which the kernels may see as several."""
    heads = max(1, kind.heads // tp)
    names = [f"model.layers.{index}.self_attn.attn" for index in range(kind.layers)]
    raws: list[torch.Tensor] = []
    count = blocks * block_tokens // KERNEL
    caches = {name: _layer(kind, heads, count, raws) for name in names}
    common = {"block_size": block_tokens, "num_kv_heads": heads, "dtype": kind.contents[0].dtype}
    spec: Any
    if kind.latent:
        spec = AscendMLAAttentionSpec(head_size=sum(each.size for each in kind.contents), **common)
    else:
        spec = FullAttentionSpec(head_size=kind.contents[0].size, **common)
    config = KVCacheConfig(blocks, [], [KVCacheGroupSpec(names, spec)])
    made = describe(config, caches, tp, rank, kind.heads)
    return replace(made, raw=raws)


def _layer(kind: Kind, heads: int, count: int, raws: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    shapes = [(count, KERNEL, heads if each.divided else 1, each.size) for each in kind.contents]
    sizes = [math.prod(shape) * each.dtype.itemsize for shape, each in zip(shapes, kind.contents, strict=True)]
    if kind.paged:
        return _paged(kind, shapes, aligned(sum(sizes), raws), raws)
    alone = len(sizes) if kind.packed is None else kind.packed
    parts = [aligned(size, raws) for size in sizes[:alone]]
    if alone < len(sizes):
        shared, at = aligned(sum(sizes[alone:]), raws), 0
        for size in sizes[alone:]:
            parts.append(shared[at : at + size])
            at += size
    every = zip(parts, kind.contents, shapes, strict=True)
    return tuple(part.view(each.dtype).view(shape) for part, each, shape in every)


def _paged(
    kind: Kind, shapes: Sequence[tuple[int, ...]], raw: torch.Tensor, raws: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Views whose blocks are a page apart, each page holding a block of all contents."""
    page, start, out = raw.numel() // shapes[0][0], int(raw.storage_offset()), []
    for each, shape in zip(kind.contents, shapes, strict=True):
        size = each.dtype.itemsize
        inner = torch.empty(shape[1:]).stride()
        whole = raws[-1].view(each.dtype)
        out.append(torch.as_strided(whole, shape, (page // size, *inner), start // size))
        start += math.prod(shape[1:]) * size
    return tuple(out)


def describe(config: Any, caches: dict[str, Any], tp: int, rank: int, heads: int) -> Rank:
    """Through the plugin, as its worker side does it."""
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=1),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    regions, layout = describe_caches(vllm_config, config, caches, (0, rank))
    return Rank(layout, regions, caches)


def hybrid_rank(tp: int, rank: int, blocks: int, block_tokens: int, heads: int = 2) -> Rank:
    """One raw buffer for an attention layer and a layer of states: first the convolution's state of every block, then
    what is K of blocks of the one and a state of blocks of the other, then V."""
    here, size = max(1, heads // tp), 64
    part = block_tokens * here * size * 2
    conv, state = (3, 96 // tp), (part // 4 // 16, 16)
    raws: list[torch.Tensor] = []
    conv_bytes = blocks * math.prod(conv) * 2
    raw = aligned(conv_bytes + 2 * blocks * part, raws)
    shape = (blocks * block_tokens // KERNEL, KERNEL, here, size)
    middle = raw[conv_bytes : conv_bytes + blocks * part]
    attention = tuple(
        piece.view(BF16).view(shape) for piece in (middle, raw[conv_bytes + blocks * part :][: blocks * part])
    )
    states = [raw[:conv_bytes].view(BF16).view(blocks, *conv), middle.view(torch.float32).view(blocks, *state)]
    specs = [
        FullAttentionSpec(block_size=block_tokens, num_kv_heads=here, head_size=size, dtype=BF16),
        MambaSpec(block_size=block_tokens, shapes=(conv, state), dtypes=(BF16, torch.float32)),
    ]
    names = ["model.layers.0.self_attn.attn", "model.layers.1.linear_attn"]
    groups = [KVCacheGroupSpec([name], spec) for name, spec in zip(names, specs, strict=True)]
    caches = dict(zip(names, (attention, states), strict=True))
    return replace(describe(KVCacheConfig(blocks, [], groups), caches, tp, rank, heads), raw=raws)
