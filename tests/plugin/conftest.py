"""Engines of one process: what they share is made once, what a test makes is closed at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")

pytest.importorskip("vllm")


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    """The emulated NPU, where $PDC_TEST_DEVICE asks for it."""
    if os.environ.get("PDC_TEST_DEVICE") == "npu":
        from tests.ascend_emulated import torch_npu
        from tests.ascend_emulated.device import library

        library()
        torch_npu.load()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pd_connector.demo.model import build_model

    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups, of one rank: workers ask them who they are."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    from .engine import engine_config

    with set_current_vllm_config(engine_config(model, "kv_both")):
        meeting = tmp_path_factory.mktemp("ranks") / "meeting"
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def engine(model: Path, ranks: None) -> Iterator[Callable[..., Any]]:
    """``engine(role, extra, **options)``: a started MiniEngine; bytes go over ZeroMQ, or $PDC_TEST_TRANSPORT, unless
    ``extra`` says otherwise."""
    from .engine import MiniEngine, engine_config

    started: list[Any] = []

    def start(role: str, extra: dict[str, Any] | None = None, **options: Any) -> Any:
        over = os.environ.get("PDC_TEST_TRANSPORT", "zmq")
        settings = {"transport": over if over == "auto" else [over], "drain_seconds": 0, **(extra or {})}
        made = MiniEngine(engine_config(model, role, extra=settings, **options))
        started.append(made)
        return made

    yield start
    for made in started:
        made.shutdown()


@pytest.fixture
def listener() -> Iterator[Any]:
    from .listener import Listener

    listener = Listener()
    yield listener
    listener.close()
