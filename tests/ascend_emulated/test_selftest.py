"""``pdc doctor --selftest`` against the emulated libraries and a fake hccn_tool. Not run on hardware."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pd_connector.config import Config
from pd_connector.doctor import selftest
from pd_connector.doctor.child import Child
from pd_connector.doctor.findings import Findings
from pd_connector.doctor.symbols import LIBRARIES, look
from pd_connector.doctor.testbed import SIZES
from pd_connector.memory import MemoryKind, native
from pd_connector.transport.device import why_no_device

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")
needs_device = pytest.mark.skipif(
    native() is not None and why_no_device(MemoryKind.NPU) is not None,
    reason=f"NO NPU DEVICE IN THIS BUILD, NPU MEMORY IS NOT TRIED: {native() and why_no_device(MemoryKind.NPU)}",
)

HCCN_TOOL = """#!/bin/sh
case "$3" in
-link) echo "link status: UP" ;;
-net_health) echo "net health status: Init" ;;
-ip) echo "ipaddr:10.20.0.$2"; echo "netmask:255.255.255.0" ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("hccn_tool", HCCN_TOOL), ("npu-smi", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def run(*transports: str, **options: Any) -> Findings:
    return selftest.run(selftest.Options(Config(), transports, **options), lambda words: None)


def test_every_symbol_is_there() -> None:
    assert [(found.library, found.problem, found.missing) for found in look()] == [
        (each.name, "", ()) for each in LIBRARIES
    ]


def test_host_memory_over_hixl() -> None:
    found = run("hixl")
    made = next(each for each in found.trials if each.memory == "host")
    assert made.passed, made
    assert [read.block_bytes for read in made.reads] == list(SIZES)
    assert [step.passed for step in made.steps] == [True] * 3
    rows = {row.name: row for row in found.rows}
    assert rows["libcann_hixl.so"].found == "all 9 symbols are there"
    assert json.loads(found.as_json())["failed"] is found.failed


def test_a_killed_owner_is_a_finding() -> None:
    def shoot(child: Child) -> None:
        if child.name == "owner":
            threading.Timer(0.1, child.kill).start()

    found = selftest.run(selftest.Options(Config(), ("hixl",)), lambda words: None, shoot)
    assert found.failed
    assert "the owner died by SIGKILL" in found.trials[0].problem


@pytest.mark.usefixtures("tools")
def test_what_the_tools_say_is_shown() -> None:
    found = run("hixl", devices=(1, 1))
    rows = {row.name: (row.state, row.found) for row in found.rows}
    if why_no_device(MemoryKind.NPU) is not None and not list(Path("/dev").glob("davinci*")):
        assert "NPU 1 link" not in rows, "there is no NPU to ask about"
        return
    assert rows["NPU 1 link"] == ("ok", "link status: UP")
    assert rows["NPU 1 network"] == ("warn", "net health status: Init")
    assert rows["NPU 1 address"] == ("ok", "ipaddr:10.20.0.1 | netmask:255.255.255.0")


@needs_device
@pytest.mark.usefixtures("tools")
def test_npu_memory_over_everything() -> None:
    found = run()
    made = {each.transport: each for each in found.trials if each.memory == "npu"}
    assert set(made) >= {"hixl", "hccl", "staged-shm", "staged-tcp", "staged-zmq"}
    for each in made.values():
        assert each.passed, each
        assert each.devices == (0, 1)
        assert [read.verified for read in each.reads] == [True] * len(SIZES)
    assert not found.failed, found.as_text()
    assert found.seconds < 60
    names = {row.name for row in found.rows}
    assert {"NPU 0 link", "NPU 0 network", "NPU 1 address"} <= names


@needs_device
def test_one_visible_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    found = run("hixl", "hccl")
    assert {each.devices for each in found.trials if each.memory == "npu"} == {(0, 0)}
    assert ["two NPUs" in each.reason for each in found.unavailable if each.transport == "hccl"] == [True]


@needs_device
def test_a_wrong_byte_in_npu_memory_shows() -> None:
    found = run("hixl", wrong_byte=True)
    made = next(each for each in found.trials if each.memory == "npu")
    assert found.failed
    assert not any(read.verified for read in made.reads)
