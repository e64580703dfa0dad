"""Who we are to a peer: the model whose KV we hold, and how our blocks are laid out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pd_connector.errors import ConfigError
from pd_connector.layout import GroupLayout, KVLayout, heads_of_rank
from pd_connector.memory import Region
from pd_connector.tensors import to_regions
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.interior import Content, dtype_of, form_of, state_form

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
    """Regions and layout of a worker's KV cache tensors: every group that vLLM hands over, in its order.

    Raises ConfigError for a way of dividing the cache that cannot be handed over."""
    num_blocks = int(kv_cache_config.num_blocks)
    caches: dict[str, tuple[Any, ...]] = {}
    group_of: dict[str, int] = {}
    groups = []
    for index, group_id in enumerate(compat.transfer_groups(kv_cache_config)):
        group = kv_cache_config.kv_cache_groups[group_id]
        held = [name for name in group.layer_names if name in kv_caches]
        layers = {name: _logical_blocks(name, kv_caches[name], num_blocks) for name in held}
        caches.update(layers)
        group_of.update(dict.fromkeys(layers, index))
        groups.append(_group(vllm_config, group.kv_cache_spec, layers, rank[1]))
    parallel = vllm_config.parallel_config
    stages, tensor_parallel = int(parallel.pipeline_parallel_size), int(parallel.tensor_parallel_size)
    layout = KVLayout(
        platform=compat.platform_words(vllm_config, next(iter(caches), "")),
        rank=rank[0] * tensor_parallel + rank[1],
        ranks=stages * tensor_parallel,
        groups=tuple(groups),
    )
    return to_regions(caches, group_of), layout


def _group(vllm_config: Any, group_spec: Any, layers: Mapping[str, Sequence[Any]], tensor_rank: int) -> GroupLayout:
    tensor_parallel = int(vllm_config.parallel_config.tensor_parallel_size)
    specs = {name: compat.layer_spec(group_spec, name) for name in layers}
    spec = next(iter(specs.values()), group_spec)
    stateful = compat.is_state(spec)
    total, first, heads = _heads(vllm_config, spec, tensor_parallel, tensor_rank)
    tokens = 1 if stateful else int(spec.block_size)
    dtype = dtype_of(spec)
    forms = {}
    for name, tensors in layers.items():
        if stateful:
            forms[name] = state_form(tensors, f"divided among {total}")
            continue
        latent = compat.is_latent(spec)
        packing = "" if latent else compat.interior_packing(specs[name].dtype, tokens, int(specs[name].head_size))
        forms[name] = form_of(tensors, Content(heads, tokens, dtype_of(specs[name]), latent, packing))
    every = tuple(dict.fromkeys(forms.values()))
    return GroupLayout(
        kind=type(spec).__name__,
        block_tokens=tokens,
        heads=heads,
        first_head=first,
        total_heads=total,
        dtype=dtype,
        layers=tuple(forms),
        forms=every,
        form_of=tuple(every.index(form) for form in forms.values()),
    )


def _heads(vllm_config: Any, spec: Any, tensor_parallel: int, rank: int) -> tuple[int, int, int]:
    """(KV heads of the model, first one here, how many here): divided evenly, or replicated where heads are fewer."""
    if compat.is_latent(spec) or getattr(spec, "tp_replicated", False):
        return 1, 0, 1
    if compat.is_state(spec):
        return tensor_parallel, rank, 1
    here = int(spec.num_kv_heads)
    model = int(vllm_config.model_config.get_total_num_kv_heads())
    shards = getattr(spec, "max_tp_shards", None) or (model if here == 1 else tensor_parallel)
    total = here * min(int(shards), tensor_parallel)
    first, heads = heads_of_rank(total, tensor_parallel, rank)
    if heads != here:
        raise ConfigError(f"{here} KV heads on each of {tensor_parallel} ranks, the model has {total}: not supported")
    return total, first, heads


def _logical_blocks(name: str, value: Any, num_blocks: int) -> tuple[Any, ...]:
    """A layer's tensors. Kernels may see a block as several smaller ones; the scheduler's ids count logical ones."""
    if isinstance(value, tuple | list):
        return tuple(tensor for part in value for tensor in _logical_blocks(name, part, num_blocks))
    if value.shape[0] < num_blocks:
        raise ConfigError(f"layer {name}: shape {tuple(value.shape)} does not begin with the {num_blocks} blocks")
    if value.shape[0] == num_blocks or value.shape[0] % num_blocks:
        return (value,)
    return (value.unflatten(0, (num_blocks, value.shape[0] // num_blocks)),)
