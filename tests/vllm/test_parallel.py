"""Tensor parallelism 2 on both sides: each decode rank reads from its prefill rank."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from serving import (
    BLOCK,
    BLOCK_BYTES,
    LAYERS,
    Both,
    Cluster,
    Gauge,
    Held,
    address_between,
    ask,
    body,
    prefill,
    prompt_of,
    same,
    until,
)

from pd_connector import Agent, Portal, Ticket
from pd_connector.demo.instance import Instance, vllm_instance
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import Saved
from pd_connector.protocol.params import to_params, with_prefix, with_report, with_save

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def loaded_by_both(p: Instance, d: Instance, prompt: list[int]) -> bool:
    """The answer is right in any case. Four busy workers on two cores may starve longer, at first or later, than the
    protocol waits; then a rank computes its half itself, and this is False."""
    gauge = Gauge(d)
    same(ask(d, prompt, 6, prefill(p, prompt)), ask(p, prompt, 6, cache_salt="plain"))
    if gauge.event("transfers_done") < 2:
        assert gauge.event("tokens_recomputed") == len(prompt) - 1, "one rank's half is not used without the other's"
        return False
    blocks = -(-len(prompt) // BLOCK)
    assert gauge.since("pdc_bytes_transferred_sum") == blocks * BLOCK_BYTES * LAYERS
    assert gauge.since("pdc_bytes_transferred_count") == 2, "one load per rank"
    assert gauge.since("pdc_audit_digests_compared_total") == 2 * blocks * LAYERS
    assert gauge.event("tokens_recomputed") == 0
    return True


def read_along_by_both(p: Instance, d: Instance, prompt: list[int]) -> bool:
    """As above, but D's ranks read while P's compute."""
    address = address_between(p, d)
    gauge = Gauge(d)
    same(Both(p, d, address, prompt).join(), ask(p, prompt, 6, cache_salt="plain"))
    return gauge.event("transfers_done") == 2 and gauge.event("tokens_recomputed") == 0


def next_turn_by_both(p: Instance, d: Instance, prompt: list[int], listener: Listener) -> bool:
    """D's ranks keep their halves, P's ranks read those: P has no prefix cache."""
    of, gauge = secrets.token_bytes(16), Gauge(p)
    ask(d, prompt, 6, with_save(with_report(prefill(p, prompt), listener.address, of)))
    until(lambda: any(saved.of == of for saved in listener.saved), 20)
    (saved,) = (saved for saved in listener.saved if saved.of == of)
    if not saved.ticket:
        return False
    kept = to_params(Ticket.from_bytes(saved.ticket), request_id="", engine_id="", tp_size=1, pp_size=1)
    second = prompt[:-5] + prompt_of(60, seed=repr(of))
    asked = body(second, 1, with_prefix({"do_remote_decode": True}, kept))
    ticket = p.post("/v1/completions", asked)["kv_transfer_params"]
    same(ask(d, second, 6, ticket), ask(p, second, 6, cache_salt="plain"))
    if gauge.event("transfers_done") < 2:
        return False
    blocks = (len(prompt) - 5) // BLOCK
    assert gauge.since("pdc_bytes_transferred_sum") == blocks * BLOCK_BYTES * LAYERS
    assert gauge.since("pdc_audit_digests_compared_total") == 2 * blocks * LAYERS
    return True


class Listener:
    """A router's agent, as far as it is told what was kept."""

    def __init__(self) -> None:
        self.saved: list[Saved] = []
        self._portal = Portal("listener")
        self._agent = Agent(on_note=self._noted)
        self._portal.call(self._agent.start)
        self.address = self._agent.address

    def _noted(self, note: ev.Note) -> None:
        if isinstance(note, ev.Informed) and isinstance(note.message, Saved):
            self.saved.append(note.message)

    def close(self) -> None:
        self._portal.run(self._agent.close(), timeout=10)
        self._portal.close()


@pytest.mark.slow
def test_two_ranks_on_each_side(servers: Cluster, tmp_path: Path, model: Path) -> None:
    servers.stop()  # two cores do not carry more
    both, d = (
        vllm_instance(
            name,
            model,
            tmp_path / name,
            role=role,
            extra={"audit": True} | ({"pool_bytes": 64 << 20} if name == "D" else {}),
            arguments=(
                *(("--no-enable-prefix-caching",) if name == "P" else ()),
                *("--tensor-parallel-size", "2", "--num-gpu-blocks-override", "32", "--max-model-len", "3072"),
                *("--max-num-batched-tokens", "512"),
            ),
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        for name, role in (("P", "kv_both"), ("D", "kv_consumer"))
    )
    try:
        for server in (both, d):
            server.start()
        for server in (both, d):
            server.wait_ready(350)
        assert any(loaded_by_both(both, d, prompt_of(300, seed=seed)) for seed in range(4))
        assert any(loaded_by_both(both, d, prompt_of(1000, seed=seed)) for seed in range(4))
        assert any(read_along_by_both(both, d, prompt_of(2000, seed=seed)) for seed in range(4))
        listener = Listener()
        assert any(next_turn_by_both(both, d, prompt_of(1000, seed=f"turn {n}"), listener) for n in range(4))
        listener.close()
        for server in (both, d):
            held = Held(server)
            until(held.nothing, 10, lambda held=held: f"{held}")
    finally:
        for server in (both, d):
            server.stop()
