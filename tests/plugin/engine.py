"""A vLLM engine without its servers: the real Scheduler, both halves of the real connector, real agents and real bytes.

Only the model is ours. It writes into the KV cache what depends on every token before, reading its own state back from
there, and its next token depends on every byte of the request's KV. So one wrong, stale or missing byte of KV changes
the answer, and ``reference`` tells the right one.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pd_connector.vllm_plugin.connector import PDConnector

BLOCK = 16
LAYERS = 2
VOCABULARY = 1000
PATIENCE = float(os.environ.get("PDC_TEST_PATIENCE", "1"))
"""An emulated machine is slow."""
DEVICE = os.environ.get("PDC_TEST_DEVICE", "cpu")
"""Where the KV cache is: "npu" is the emulated one of tests/ascend_emulated."""
_HEAD = 4  # 1 head x (K + V) x 4 x bfloat16 = 16 bytes, two words of int64, per token and layer
_MIX = 6364136223846793005
_WORD = 2**63


def _next_state(state: int, token: int) -> int:
    return (state * _MIX + token * 1442695040888963407 + 1) % _WORD


def _words(state: int, layer: int) -> tuple[int, int]:
    return state, _next_state(state, layer)


def reference(prompt: Sequence[int], count: int) -> list[int]:
    """What any engine must answer."""
    tokens, states = list(prompt), [0]
    for token in tokens:
        states.append(_next_state(states[-1], token))
    for _ in range(count):
        total = sum(
            place * sum(_words(state, layer)) for place, state in enumerate(states[1:], 1) for layer in range(LAYERS)
        )
        tokens.append(total % VOCABULARY)
        states.append(_next_state(states[-1], tokens[-1]))
    return tokens[len(prompt) :]


def _seen(storage: torch.Tensor) -> torch.Tensor:
    """The same memory for the model, which is no kernel: an emulated device's can be reached by the processor."""
    if storage.device.type == "cpu":
        return storage
    whole = (ctypes.c_ubyte * storage.nbytes).from_address(storage.data_ptr())
    return torch.frombuffer(whole, dtype=storage.dtype).view(storage.shape)


def engine_config(
    model: Path,
    role: str,
    *,
    extra: Mapping[str, Any] | None = None,
    policy: str = "recompute",
    blocks: int = 64,
    budget: int = 4096,
    **arguments: Any,
) -> Any:
    """A VllmConfig as ``vllm serve`` would make it."""
    transfer = {
        "kv_connector": "PDConnector",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": dict(extra or {}),
    }
    config = EngineArgs(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=budget,
        block_size=BLOCK,
        kv_transfer_config=transfer,
        **arguments,
    ).create_engine_config()
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = blocks
    return config


class MiniEngine:
    """Scheduler, connector pair and cache of one instance; ``step`` is one engine step in vLLM's own order of calls."""

    def __init__(self, config: Any) -> None:
        self.config = config
        blocks = int(config.cache_config.num_gpu_blocks)
        names = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
        self.storage = torch.zeros((LAYERS, blocks, 1, BLOCK, 2 * _HEAD), dtype=torch.bfloat16, device=DEVICE)
        self.words = _seen(self.storage).view(torch.int64).view(LAYERS, blocks, BLOCK, 2)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=_HEAD, dtype=torch.bfloat16)
        size = self.storage.nbytes
        page = size // LAYERS // blocks
        tensor = KVCacheTensor(size, layers=names, offset=0, layer_stride=page * blocks, block_stride=page)
        self.cache_config = KVCacheConfig(blocks, [tensor], [KVCacheGroupSpec(names, spec)])
        self.worker = PDConnector(config, KVConnectorRole.WORKER, self.cache_config)
        self.worker.register_kv_caches(dict(zip(names, self.storage, strict=True)))
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = Scheduler(
            config, self.cache_config, StructuredOutputManager(config), block_size=BLOCK, log_stats=True
        )
        shake = self.worker.get_handshake_metadata()
        assert shake is not None
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): shake})
        self.params: dict[str, dict[str, Any] | None] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, RequestStatus] = {}
        self.stats: list[dict[str, Any]] = []
        self.outputs: list[KVConnectorOutput] = []
        self._requests: dict[str, Request] = {}

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def counters(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for stats in self.stats:
            for name, count in stats.get("counters", {}).items():
                total[name] = total.get(name, 0) + count
        return total

    @property
    def transfers(self) -> list[dict[str, Any]]:
        return [transfer for stats in self.stats for transfer in stats.get("transfers", ())]

    @property
    def gauges(self) -> dict[str, int]:
        return dict(self.worker.worker._agent.gauges())

    def add(
        self, name: str, prompt: Sequence[int], *, tokens: int = 1, params: Mapping[str, Any] | None = None, **more: Any
    ) -> Request:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        sampling.extra_args = {"kv_transfer_params": dict(params)} if params is not None else None
        sampling.update_from_generation_config({}, None)
        request = Request(name, list(prompt), sampling, None, block_hasher=self._hasher, **more)
        self._requests[name] = request
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> KVConnectorOutput:
        """schedule, handle_preemptions, forward, start_load_kv, wait_for_save, results, update_from_output."""
        plan = self.scheduler.schedule()
        self.worker.handle_preemptions(plan.kv_connector_metadata)
        self.worker.bind_connector_metadata(plan.kv_connector_metadata)
        sampled = {name: self._forward(name, count) for name, count in plan.num_scheduled_tokens.items()}
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(plan.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_stats=self.worker.get_kv_connector_stats(),
        )
        self.worker.clear_connector_metadata()
        self.outputs.append(output)
        names = list(sampled)
        answer = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            kv_connector_output=output,
        )
        self._take(self.scheduler.update_from_output(plan, answer))
        return output

    def _take(self, results: Mapping[int, Any]) -> None:
        for result in results.values():
            if result.scheduler_stats is not None and result.scheduler_stats.kv_connector_stats:
                self.stats.append(result.scheduler_stats.kv_connector_stats)
            for one in result.outputs:
                self.tokens.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.ended[one.request_id] = self._requests[one.request_id].status
                    self.params[one.request_id] = one.kv_transfer_params

    def _forward(self, name: str, count: int) -> list[int]:
        """Compute ``count`` tokens of a request; the sampled token when the request's last token was among them."""
        request = self.scheduler.requests[name]
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        end = request.num_computed_tokens  # already advanced by schedule()
        slots = torch.tensor([blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(end)])
        flat = self.words.flatten(1, 2)
        state = int(flat[0, slots[end - count - 1], 0]) if end > count else 0
        for at in range(end - count, end):
            state = _next_state(state, request.all_token_ids[at])
            for layer in range(LAYERS):
                flat[layer, slots[at]] = torch.tensor(_words(state, layer))
        if end < request.num_tokens:
            return []
        rows = flat[:, slots].transpose(0, 1).flatten(1).tolist()
        return [sum(place * sum(row) for place, row in enumerate(rows, 1)) % VOCABULARY]

    def until(self, done: Callable[[], bool], seconds: float = 15.0) -> None:
        """Step until ``done``; raises TimeoutError."""
        deadline = time.monotonic() + seconds * PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"ended {self.ended}, gauges {self.gauges}, counters {self.counters}")
            self.step()
            time.sleep(0.001)

    def finish(self, name: str, seconds: float = 15.0) -> list[int]:
        """Step until a request has ended; its tokens."""
        self.until(lambda: name in self.ended, seconds)
        return self.tokens.get(name, [])

    def settle(self, seconds: float = 15.0) -> None:
        """Step until nothing is held, then assert that every block came back."""
        self.until(lambda: not self.scheduler.has_requests(), seconds)
        self.step()
        gauges = self.gauges
        assert not any(value for state, value in gauges.items() if state != "peers"), gauges
        assert self.free_blocks == self.cache_config.num_blocks - 1  # block 0 is vLLM's null block
        scheduler = self.scheduler.connector.scheduler
        assert not len(scheduler.decode)
        assert not len(scheduler.prefill)
        assert not scheduler.decode._lost
        assert not len(scheduler.side.accounts)
        assert not scheduler.side.accounts._computing

    def shutdown(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()
