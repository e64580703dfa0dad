"""``pdc demo`` with real vLLM: it passes, it fails with one wrong byte, and it leaves no process behind."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pd_connector.demo.model import SMALL
from pd_connector.demo.verdict import STAGES
from pd_connector.memory import native

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

DEMO = [sys.executable, "-m", "pd_connector.cli", "demo", "--json", "--deadline", "900"]
BLOCK_TOKENS = 128
STOP_S = 90.0
TRANSPORT = "shm" if native() else "zmq"


@dataclass
class Demo:
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def stdout(self) -> str:
        return (self.directory / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text()

    def wait_for(self, what: Callable[[], Any], seconds: float = 900.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.1)

    def result(self) -> dict[str, Any]:
        """Stdout is the one object."""
        parsed: dict[str, Any] = json.loads(self.stdout)
        return parsed

    def processes(self) -> list[str]:
        """Command lines of everything that the demo started: its processes, and theirs, work in its directory."""
        found = []
        for cwd in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if cwd.readlink() == self.directory:
                    found.append((cwd.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the model is built once."""
    return tmp_path_factory.mktemp("demo").resolve()


@contextmanager
def demo(directory: Path, *arguments: str) -> Iterator[Demo]:
    with (directory / "stdout").open("wb") as out, (directory / "stderr").open("wb") as err:
        process = subprocess.Popen([*DEMO, "--workdir", str(directory), *arguments], stdout=out, stderr=err)
    running = Demo(process, directory)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)


def test_it_passes(directory: Path) -> None:
    with demo(directory) as running:
        assert running.process.wait(1000) == 0, running.stderr
        assert running.processes() == []
        result = running.result()
        assert result["verdict"] == "pass"
        prompts = result["prompts"]
        assert [prompt["prompt_tokens"] for prompt in prompts] == [1, 31, 128, 129, 1000, 3000]
        for prompt in prompts:
            length = prompt["prompt_tokens"]
            assert prompt["tokens_equal_or_tie"] is True
            assert prompt["recomputed_tokens"] == 0
            assert list(prompt["ttft_ms"]) == list(STAGES)
            assert all(ms >= 0 for ms in prompt["ttft_ms"].values())
            assert all(prompt["ttft_ms"][stage] > 0 for stage in ("router", "prefill", "first_token"))
            if length == 1:
                assert (prompt["digests_equal"], prompt["kv_bytes"], prompt["transport"]) == (None, 0, "none")
                continue
            blocks = math.ceil(length / BLOCK_TOKENS)
            assert prompt["digests_equal"] is True
            assert prompt["digests_compared"] == blocks * SMALL.layers
            assert prompt["kv_bytes"] == blocks * BLOCK_TOKENS * SMALL.kv_bytes_per_token
            assert prompt["transport"] == TRANSPORT
            assert prompt["ttft_ms"]["wire"] > 0
            assert prompt["ttft_ms"]["commit"] > 0
        assert f"D reads from P over {TRANSPORT} (inproc: the peer lives in process" in running.stderr


def test_one_wrong_byte_is_found_and_an_interrupt_leaves_nothing(directory: Path) -> None:
    with demo(directory, "--plant", "wrong-byte", "--prompts", "128,129", "--keep") as running:
        running.wait_for(lambda: "curl" in running.stderr)
        result = running.result()
        assert result["verdict"] == "fail"
        planted, clean = result["prompts"]
        assert planted["digests_equal"] is False
        assert planted["recomputed_tokens"] == 127
        assert planted["kv_bytes"] == 0
        # Caught, so the bad block was computed again and the answer is right all the same.
        assert planted["tokens_equal_or_tie"] is True
        assert clean["digests_equal"] is True
        assert clean["recomputed_tokens"] == 0
        assert len(running.processes()) >= 5
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(STOP_S) == 1
        assert running.processes() == []


def test_an_interrupt_while_starting_leaves_nothing(directory: Path) -> None:
    with demo(directory) as running:
        running.wait_for(lambda: len(running.processes()) >= 5)  # the engines proper are among them
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        # Impatience must not cut the cleaning up short.
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(STOP_S) == 130, running.stderr
        assert running.processes() == []
        assert running.stdout == ""
        assert "Traceback" not in running.stderr


def test_it_says_why_it_could_not_run(directory: Path) -> None:
    with demo(directory, "--deadline", "1") as running:
        assert running.process.wait(300) == 2
        assert running.stdout == ""
        last = running.stderr.splitlines()[-1]
        assert last.startswith("pdc demo: ")
        assert "was not ready in" in last
        assert running.processes() == []
