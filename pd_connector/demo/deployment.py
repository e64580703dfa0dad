"""P, D and the router as processes: started together, watched while they come up, stopped together."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pd_connector.demo.client import ask
from pd_connector.demo.instance import Instance, InstanceFailed, free_port, vllm_instance
from pd_connector.demo.interrupts import Interrupts
from pd_connector.demo.prompts import random_prompts

_READY_POLL_S = 0.25
_WARM_UP_TOKENS = 300
_FAULT_SCRIPT = "faults.json"
_ONE_WRONG_BYTE = '{"rules": [{"on": "post_read", "nth": 1, "action": "corrupt"}]}'
"""The first read of the run gets one byte flipped behind its back."""

Say = Callable[[str], None]


class Deployment:
    """One prefill and one decode instance, one core each, and a router in front. Logs lie in ``directory``."""

    def __init__(self, model: Path, directory: Path, *, wrong_byte: bool, interrupts: Interrupts) -> None:
        self.model = model
        self._interrupts = interrupts
        extra: dict[str, Any] = {"audit": True}
        if wrong_byte:
            script = directory / _FAULT_SCRIPT
            script.write_text(_ONE_WRONG_BYTE)
            faulty = {"inner": "zmq", "script": str(script)}
            extra |= {"transport": "faulty", "transport_options": {"faulty": faulty}}
        cores = sorted(os.sched_getaffinity(0))
        self.prefill = vllm_instance("prefill", model, directory / "prefill.log", role="kv_producer", core=cores[0])
        self.decode = vllm_instance(
            "decode", model, directory / "decode.log", role="kv_consumer", core=cores[1 % len(cores)], extra=extra
        )
        port = free_port()
        command = [sys.executable, "-m", "pd_connector.cli", "router", "--port", str(port)]
        command += ["--prefill", self.prefill.url, "--decode", self.decode.url]
        self.router = Instance("router", command, port, directory / "router.log")
        self._all = (self.prefill, self.decode, self.router)

    def start(self, deadline: float, say: Say) -> None:
        """Returns when all three answer. Raises InstanceFailed when one ends or ``deadline`` (monotonic) passes."""
        started = time.monotonic()
        for instance in self._all:
            instance.log.write_bytes(b"")
            with self._interrupts.held():
                instance.start()
        waiting = list(self._all)
        while waiting:
            waiting = [instance for instance in waiting if not instance.ready()]
            self._interrupts.check()
            if not waiting:
                break
            if time.monotonic() > deadline:
                name, tail = waiting[0].name, waiting[0].tail()
                raise InstanceFailed(f"{name} was not ready in {time.monotonic() - started:.0f} s; its log:\n{tail}")
            names = ", ".join(instance.name for instance in waiting)
            say(f"starting {names}, {time.monotonic() - started:.0f} s: {waiting[0].tail(1)}")
            time.sleep(_READY_POLL_S)

    def warm_up(self, deadline: float, say: Say) -> None:
        """One plain request to each engine, both at once: the first of a process compiles, and would drown the ledger.
        P and D do not meet in it."""
        say("first request to each engine: it compiles")
        seconds = max(1.0, deadline - time.monotonic())
        prompt = random_prompts((_WARM_UP_TOKENS,), 2, seed=0)[0]
        pool = ThreadPoolExecutor(2)
        try:
            for answer in [pool.submit(ask, instance, prompt, timeout=seconds) for instance in self._all[:2]]:
                answer.result()
        finally:
            # Not waiting: after Ctrl-C the requests end when their engines do.
            pool.shutdown(wait=False)
        self._interrupts.check()

    def check(self) -> None:
        """Raises InstanceFailed when a process has ended."""
        for instance in self._all:
            if instance.process is not None and (status := instance.process.poll()) is not None:
                raise InstanceFailed(f"{instance.name} ended with status {status}; its log:\n{instance.tail()}")

    def stop(self) -> None:
        """All at once; afterwards none of their processes is left."""
        for instance in reversed(self._all):
            instance.signal(signal.SIGTERM)
        for instance in reversed(self._all):
            instance.stop()
