"""Our Config out of vLLM's: extra_config, kv_port, data-parallel offset."""

from __future__ import annotations

from typing import Any

import msgspec

from pd_connector.config import Config, parse
from pd_connector.errors import ConfigError
from pd_connector.vllm_plugin import compat


def instance_config(vllm_config: Any) -> Config:
    """Settings of this engine's advertised agent. Raises ConfigError."""
    transfer = vllm_config.kv_transfer_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (ranks := int(getattr(vllm_config.parallel_config, name, 1))) > 1:
            raise ConfigError(f"{name} {ranks} interleaves tokens over ranks: use 1 with PDConnector")
    config = parse(transfer.kv_connector_extra_config or {}, "kv_connector_extra_config")
    if config.pool_bytes and not transfer.is_kv_consumer:
        raise ConfigError("pool_bytes is for decode instances: with kv_role kv_producer no turn ends here")
    port = config.port
    if not port and transfer.kv_port != compat.VLLM_DEFAULT_KV_PORT:
        port = int(transfer.kv_port)
    if port:
        offset = port + compat.data_parallel_rank(vllm_config.parallel_config)
        if offset > 65535:
            raise ConfigError(f"port {port} plus the data-parallel rank is {offset}, above 65535; choose a lower port")
        port = offset
    return msgspec.structs.replace(config, port=port)


def worker_config(vllm_config: Any) -> Config:
    """Settings of a worker's agent: ports of its own, learned by peers through the advertised one."""
    return msgspec.structs.replace(instance_config(vllm_config), port=0)
