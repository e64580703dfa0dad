"""A prefill and a decode engine that step in turns, as two processes would."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pd_connector.testing.faults import read_events

from .engine import PATIENCE, MiniEngine

PREFILL = {"do_remote_decode": True}


def words(count: int, seed: int = 0) -> list[int]:
    """A prompt; two seeds differ from the first token on."""
    return [(7 * at + 131 * seed + 3) % 997 for at in range(count)]


def faulty(script: Path) -> dict[str, Any]:
    """extra_config of an engine whose reads follow a fault script."""
    return {"transport": ["faulty"], "transport_options": {"faulty": {"inner": "zmq", "script": str(script)}}}


def happened(script: Path, event: str) -> bool:
    return any(entry["event"] == event for entry in read_events(script))


class Pair:
    def __init__(self, prefill: MiniEngine, decode: MiniEngine) -> None:
        self.prefill, self.decode = prefill, decode

    def step(self) -> None:
        for engine in (self.prefill, self.decode):
            if engine.scheduler.has_requests():  # as vLLM's busy loop
                engine.step()
        time.sleep(0.001)

    def until(self, done: Callable[[], bool], seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds * PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"P {self.prefill.gauges} {self.prefill.counters}, D {self.decode.gauges} {self.decode.counters}"
                )
            self.step()

    def ticket(self, name: str, prompt: Sequence[int], **more: Any) -> dict[str, Any]:
        """Prefill a prompt; what P returned."""
        self.prefill.add(name, prompt, params=PREFILL, **more)
        self.until(lambda: name in self.prefill.ended)
        params = self.prefill.params[name]
        assert params is not None
        return params

    def decode_all(
        self, name: str, prompt: Sequence[int], params: Mapping[str, Any] | None, tokens: int = 3, **more: Any
    ) -> list[int]:
        self.decode.add(name, prompt, tokens=tokens, params=params, **more)
        self.until(lambda: name in self.decode.ended)
        return self.decode.tokens.get(name, [])

    def settle(self, seconds: float = 15.0) -> None:
        """Everything of both comes free, and each request was reported at most once in each direction."""
        self.until(lambda: not any(e.scheduler.has_requests() for e in (self.prefill, self.decode)), seconds)
        for engine in (self.prefill, self.decode):
            engine.settle(seconds)
            for kind in ("finished_recving", "finished_sending"):
                reported = [name for output in engine.outputs for name in getattr(output, kind) or ()]
                assert len(reported) == len(set(reported)), f"{kind}: {reported}"
