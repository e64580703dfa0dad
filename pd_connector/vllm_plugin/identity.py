"""Who we are to a peer: the model whose KV we hold, and how our blocks are laid out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pd_connector.layout import GroupLayout, KVLayout
from pd_connector.memory import Region, order_grids
from pd_connector.tensors import to_regions
from pd_connector.vllm_plugin import compat

_SAMPLES = 16
_SAMPLE_BYTES = 4096
_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash")
"""Fields of a model's config that differ between copies of the same model."""


def model_identity(model_config: Any) -> str:
    """Name and digest of a model: its config, and for weights in a local directory samples of their bytes, so that two
    fine-tunes of one architecture are told apart. Instances that load the same weights by different means (a directory
    here, a hub name there) set ``model`` in their config instead."""
    config = {k: v for k, v in model_config.hf_config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8)
    digest.update(f"{model_config.dtype} {getattr(model_config, 'quantization', None)}".encode())
    directory = Path(model_config.model)
    if directory.is_dir():
        for weights in sorted(directory.glob("*.safetensors")):
            digest.update(_samples(weights))
    else:
        digest.update(f"{model_config.model}@{getattr(model_config, 'revision', None)}".encode())
    names = config.get("architectures") or [config.get("model_type", "model")]
    return f"{names[0]}:{digest.hexdigest()}"


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    out = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * index // (_SAMPLES - 1))
            out.update(file.read(_SAMPLE_BYTES))
    return out.digest()


def describe_caches(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any], rank: tuple[int, int]
) -> tuple[list[Region], KVLayout]:
    """Regions and layout of a worker's KV cache tensors (one KV cache group: the hybrid manager is off without HMA)."""
    num_blocks = int(kv_cache_config.num_blocks)
    caches = {name: _logical_blocks(value, num_blocks) for name, value in kv_caches.items()}
    regions = to_regions(caches)
    grids = order_grids(regions)
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    heads, head_dim = int(getattr(spec, "num_kv_heads", 0)), int(getattr(spec, "head_size", 0))
    dtype = getattr(spec, "dtype", torch.uint8)
    group = GroupLayout(
        kind=type(spec).__name__,
        block_tokens=int(spec.block_size),
        heads=heads,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(caches),
        part_bytes=tuple(ref.grid.block_bytes for ref in grids),
    )
    name, cache = next(iter(caches.items()))
    first = cache[0] if isinstance(cache, tuple | list) else cache
    axes = sorted(range(1, first.dim()), key=lambda axis: -first.stride(axis))
    packing = " ".join(
        (
            compat.attention_backend(vllm_config, name),
            compat.interior_packing(dtype, int(spec.block_size), head_dim),
            "axes " + ",".join(f"{axis}:{first.shape[axis]}" for axis in axes),
        )
    )
    parallel = vllm_config.parallel_config
    stages, tensor_parallel = int(parallel.pipeline_parallel_size), int(parallel.tensor_parallel_size)
    layout = KVLayout(
        packing=packing,
        rank=rank[0] * tensor_parallel + rank[1],
        ranks=stages * tensor_parallel,
        groups=(group,),
    )
    return regions, layout


def _logical_blocks(value: Any, num_blocks: int) -> Any:
    """Kernels may see a block as several smaller ones; the scheduler's block ids count the logical ones."""
    if isinstance(value, tuple | list):
        return tuple(_logical_blocks(part, num_blocks) for part in value)
    if value.shape[0] == num_blocks or value.shape[0] % num_blocks:
        return value
    return value.unflatten(0, (num_blocks, value.shape[0] // num_blocks))
