"""Processes of the demo: vLLM instances and the router, each in a process group of its own that never outlives us."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pd_connector.config import child_environment
from pd_connector.errors import PDError

_GUARD = ("sh", "-c", 'read -r line; kill -s KILL -- "-$0"')
_STOP_SECONDS = 20.0
_KILL_SECONDS = 10.0


class InstanceFailed(PDError):
    """A process of the demo did not come up or died; the message ends with the tail of its log."""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Instance:
    """One started server process. ``role`` is kv_producer, kv_consumer, kv_both, or empty for one without connector."""

    name: str
    command: Sequence[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                env=child_environment(self.environment),
                start_new_session=True,
            )
        # Should we die without a chance to stop it, the guard's input ends and it kills the whole group.
        self.guard = subprocess.Popen(
            [*_GUARD, str(self.process.pid)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def ready(self) -> bool:
        """Does it answer /health? Raises InstanceFailed when the process has ended."""
        assert self.process is not None
        if (status := self.process.poll()) is not None:
            raise InstanceFailed(f"{self.name} ended with status {status} before it was ready:\n{self.tail()}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, seconds: float, waiting: Callable[[], None] = lambda: None) -> None:
        """Raises InstanceFailed after ``seconds``; calls ``waiting`` a few times a second."""
        deadline = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > deadline:
                raise InstanceFailed(f"{self.name} was not ready within {seconds:g} s:\n{self.tail()}")
            waiting()
            time.sleep(0.25)

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def signal(self, number: int) -> None:
        """To the whole process group: a vLLM instance is several processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """SIGTERM, then SIGKILL; afterwards nothing of the group is left (a process in the kernel's hands aside)."""
        if self.process is None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.signal(signal.SIGKILL)
        self.process.wait(10)
        # The others of the group are not our children: nobody tells us when the kill has reached them.
        deadline = time.monotonic() + _KILL_SECONDS
        while _group_lives(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.guard is not None:
            self.guard.kill()
            self.guard.communicate()
        self.process = self.guard = None

    def metrics(self) -> dict[str, float]:
        """Prometheus samples: ``name{label="value",...}`` → value, and their sum by bare name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        out: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                out[sample] = float(value)
                name = sample.partition("{")[0]
                if name != sample:
                    out[name] = out.get(name, 0.0) + float(value)
        return out

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """A JSON request; raises urllib.error.HTTPError for an error status."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            decoded: dict[str, Any] = json.load(answer)
            return decoded


def vllm_instance(
    name: str,
    model: Path,
    log: Path,
    *,
    role: str = "",
    core: int | None = None,
    policy: str = "recompute",
    extra: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Instance:
    """A vLLM server for ``model``. ``core`` pins all of its processes to one CPU core, ``extra`` is our
    kv_connector_extra_config.

    Engines that wait spin, and a spinning thread yields only to threads of its own session: without the pin, each
    instance's engine core would take half of the other one's core away from its I/O threads."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "8192", *arguments]
    if core is not None:
        command = ["taskset", "--cpu-list", str(core), *command]
        extra = {"io_cpus": [core], **(extra or {})}
    if role:
        transfer = {
            "kv_connector": "PDConnector",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": dict(extra or {}),
        }
        command += ["--kv-transfer-config", json.dumps(transfer)]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if core is not None:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    return Instance(name, command, port, log, {**settings, **(environment or {})})


def vllm_available() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _group_lives(group: int) -> bool:
    """Is any process of the group more than a zombie that its new parent has not yet collected?"""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False
