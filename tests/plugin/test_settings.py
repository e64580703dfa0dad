"""Configuration mistakes are told in words, by both halves of the connector."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from pd_connector import vllm_plugin
from pd_connector.errors import ConfigError
from pd_connector.vllm_plugin.connector import PDConnector
from pd_connector.vllm_plugin.settings import instance_config, worker_config

from .engine import MiniEngine, engine_config


def test_an_unknown_key_names_the_nearest(model: Path, engine: Any) -> None:
    caches = engine("kv_both").cache_config
    config = engine_config(model, "kv_producer", extra={"lease_second": 3})
    for role in KVConnectorRole:
        with pytest.raises(ConfigError, match="lease_second'; did you mean 'lease_seconds'"):
            PDConnector(config, role, caches)


def test_a_port_in_use(model: Path, ranks: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}.*choose a free port"):
            MiniEngine(engine_config(model, "kv_producer", extra={"port": port, "transport": ["zmq"]}))


def test_where_the_port_comes_from(model: Path) -> None:
    config = engine_config(model, "kv_producer")
    assert instance_config(config).port == 0, "vLLM's default kv_port means unset"
    config.kv_transfer_config.kv_port = 5000
    assert instance_config(config).port == 5000
    config.parallel_config.data_parallel_index = 3
    assert instance_config(config).port == 5003
    assert worker_config(config).port == 0
    config.kv_transfer_config.kv_connector_extra_config = {"port": 65535}
    with pytest.raises(ConfigError, match="65538"):
        instance_config(config)


def test_an_address_that_others_reach_needs_keys(model: Path) -> None:
    config = engine_config(model, "kv_producer", extra={"host": "0.0.0.0"})
    with pytest.raises(ConfigError, match="insecure: true"):
        instance_config(config)


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_tokens_interleaved_over_ranks_are_refused(model: Path, engine: Any, name: str) -> None:
    caches = engine("kv_both").cache_config
    config = engine_config(model, "kv_producer")
    setattr(config.parallel_config, name, 2)
    for role in KVConnectorRole:
        with pytest.raises(ConfigError, match=f"{name} 2 interleaves tokens over ranks: use 1"):
            PDConnector(config, role, caches)


def test_a_pool_is_for_decode_instances(model: Path) -> None:
    for role in ("kv_consumer", "kv_both"):
        assert instance_config(engine_config(model, role, extra={"pool_bytes": 1 << 20})).pool_bytes == 1 << 20
    with pytest.raises(ConfigError, match="no turn ends here"):
        instance_config(engine_config(model, "kv_producer", extra={"pool_bytes": 1 << 20}))


def test_registration_is_idempotent_and_finds_the_class() -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    assert KVConnectorFactory._registry["PDConnector"]() is PDConnector
    assert vllm_plugin.PDConnector is PDConnector


def test_registration_survives_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVConnectorFactory, "_registry")
    vllm_plugin.register()


@pytest.mark.parametrize("order", [("worker", "scheduler"), ("scheduler", "worker")])
def test_shutdown_in_any_order_and_twice(engine: Any, order: tuple[str, str]) -> None:
    made = engine("kv_both")
    for _ in range(2):
        for half in order:
            getattr(made, half).shutdown()
