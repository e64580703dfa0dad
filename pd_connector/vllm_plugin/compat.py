"""Everything that differs between vLLM versions (0.23 to 0.33) or platforms, as small checks of features."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
from typing import Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18

VLLM_DEFAULT_KV_PORT = 14579
"""vLLM fills this in when nobody set kv_port, so it means "unset" to us."""


def share_engine_logging() -> None:
    """Let our log lines go where vLLM's go: it configures only the logger named after itself."""
    ours, engine = logging.getLogger("pd_connector"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = engine.handlers, False
        ours.setLevel(engine.getEffectiveLevel())


def parallel_rank() -> tuple[int, int]:
    """(pipeline rank, tensor rank) of this worker."""
    return int(get_pp_group().rank_in_group), int(get_tensor_model_parallel_rank())


def data_parallel_rank(parallel_config: Any) -> int:
    """Index of this engine among the data-parallel ones, 0 without data parallelism."""
    index = getattr(parallel_config, "data_parallel_index", None)
    return int(parallel_config.data_parallel_rank if index is None else index)


def steps_in_flight(vllm_config: Any) -> int:
    """How many steps the engine may have scheduled before it processes the first one's results."""
    batches = getattr(vllm_config, "max_concurrent_batches", None)
    return int(batches if batches is not None else vllm_config.parallel_config.pipeline_parallel_size + 1)


def resumed_requests(cached: Any) -> set[str]:
    """Of the requests that were scheduled before, those that come back after a preemption, with new blocks."""
    if hasattr(cached, "resumed_req_ids"):
        return set(cached.resumed_req_ids)
    return {name for name, resumed in zip(cached.req_ids, cached.resumed_from_preemption, strict=True) if resumed}


def hybrid_bases() -> tuple[type, ...]:
    """What marks a connector as one for several KV cache groups, where vLLM can also be told that a request of several
    groups failed to load; without it vLLM makes one group of all layers."""
    supported = hasattr(base, "SupportsHMA") and hasattr(base, "KVConnectorTransferResults")
    return (base.SupportsHMA,) if supported else ()


def transfer_groups(kv_cache_config: Any) -> tuple[int, ...]:
    """Numbers of the KV cache groups that are handed over."""
    every = range(len(kv_cache_config.kv_cache_groups))
    return tuple(getattr(kv_cache_config, "transfer_group_ids", every))


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The spec of one layer: groups of one type may hold layers of several shapes."""
    return getattr(group_spec, "kv_cache_specs", {}).get(layer, group_spec)


def is_state(spec: Any) -> bool:
    """Whether blocks hold a state instead of tokens (Mamba and its kin)."""
    return not hasattr(_any_layer_spec(spec), "num_kv_heads")


def is_latent(spec: Any) -> bool:
    """Whether every rank holds the same compressed K and V (MLA)."""
    return "MLA" in type(_any_layer_spec(spec)).__name__


def forgets(spec: Any) -> bool:
    """Whether blocks of early tokens are given up while a request runs (sliding windows, chunks)."""
    return not is_state(spec) and not isinstance(_any_layer_spec(spec), FullAttentionSpec)


def _any_layer_spec(group_spec: Any) -> Any:
    return next(iter(getattr(group_spec, "kv_cache_specs", {}).values()), group_spec)


def required_layout(vllm_config: Any) -> str | None:
    """Heads before tokens: a decode instance with another tensor-parallel size then reads the heads that it needs as
    one run. CPU blocks are so anyhow, and a latent has no heads."""
    model = vllm_config.model_config
    if current_platform.device_type == "cpu" or model is None or model.use_mla:
        return None
    return "LBHNC" if "kv_cache_layout" in getattr(KVCacheConfig, "__dataclass_fields__", {}) else "HND"


def platform_words(vllm_config: Any, layer: str) -> str:
    """Attention backend and device, for people."""
    found = vllm_config.compilation_config.static_forward_context.get(layer)
    backend = str(found.get_attn_backend().get_name()) if hasattr(found, "get_attn_backend") else "unknown backend"
    return f"{backend} on {current_platform.device_type}"


def interior_packing(dtype: Any, block_tokens: int, head_dim: int) -> str:
    """Instruction set that decides how bytes are packed inside a block; empty where blocks are not packed by one."""
    if current_platform.device_type != "cpu":
        return ""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return platform.machine()
    try:
        return str(_get_attn_isa(dtype, block_tokens, head_dim))
    except TypeError:  # older signature, without the head size
        return str(_get_attn_isa(dtype, block_tokens))


def request_amx_permission() -> None:
    """Ask the kernel for AMX tiles. Without it a CPU worker whose very first forward is a decode, as on a decode
    instance, dies with SIGILL: vLLM's decode kernels use AMX, only its prefill path asks for permission."""
    if current_platform.device_type == "cpu" and platform.machine() == "x86_64":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Any:
    """One worker snapshot; only versions that ask for it (get_transfer_results) have the class."""
    return base.KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)


def media_of(request: Any) -> tuple[tuple[int, str], ...]:
    """(token position, content hash) of a request's media items."""
    features = getattr(request, "mm_features", None) or ()
    return tuple((int(item.mm_position.offset), str(item.identifier)) for item in features)
