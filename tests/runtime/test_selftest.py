"""``pdc doctor --selftest`` over the transports that are really here: what works, and everything that may go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pd_connector.config import Config
from pd_connector.doctor import selftest, trial
from pd_connector.doctor.child import Child
from pd_connector.doctor.findings import Findings
from pd_connector.doctor.testbed import SIZES
from pd_connector.errors import ConfigError
from pd_connector.memory import native
from pd_connector.transport import registry

SECONDS = 90
STEPS = ["a wrong capability", "a planted wrong byte", "a killed peer"]
HERE = [name for name in ("shm", "tcp", "zmq", "staged-shm", "staged-tcp", "staged-zmq") if native() or name == "zmq"]


def pdc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pd_connector.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)


def run(*transports: str, **options: Any) -> Findings:
    return selftest.run(selftest.Options(Config(), transports, **options), lambda words: None)


def test_every_host_transport() -> None:
    done = pdc("--selftest", "--json")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert set(told) == {"versions", "rows", "trials", "unavailable", "seconds", "failed", "note"}
    assert not told["failed"]
    assert 0 < told["seconds"] < 60
    assert {"pd_connector", "C extension", "numpy"} <= set(told["versions"])
    found = {made["transport"]: made for made in told["trials"] if made["memory"] == "host"}
    assert set(HERE) <= set(found)
    for made in found.values():
        assert made["passed"], made
        assert [read["block_bytes"] for read in made["reads"]] == list(SIZES)
        assert all(read["verified"] and read["gbps"] > 0 and read["num_bytes"] == 16 << 20 for read in made["reads"])
        assert [step["name"] for step in made["steps"]] == STEPS
        assert all(step["passed"] and step["found"] and not step["remedy"] for step in made["steps"])
        assert made["connect_ms"] > 0
    reasons = {each["transport"]: each["reason"] for each in told["unavailable"]}
    assert "one process only" in reasons["inproc"]
    assert all(reasons.values())
    assert set(registry.known()) == set(found) | set(reasons), "tried, or a reason why not"


def test_a_report_for_people() -> None:
    done = pdc("--selftest", "--transport", "zmq")
    assert done.returncode == 0, done
    assert "zmq, host memory: passed, connected in" in done.stdout
    assert "16 KiB" in done.stdout
    assert "verdict: passed" in done.stdout
    assert "nobody of this project has run them on an NPU" in done.stdout
    assert "shm" not in done.stdout
    assert "1 of 1: zmq, host memory" in done.stderr


def test_a_planted_wrong_byte_shows_in_every_read() -> None:
    found = run("zmq", wrong_byte=True)
    (made,) = found.trials
    assert found.failed
    assert not made.passed
    assert [read.verified for read in made.reads] == [False] * len(SIZES)
    assert all("wrong bytes, the first is byte" in read.found for read in made.reads)
    assert "do not use this transport" in made.remedy
    assert "FAILED" in found.as_text()
    assert [step.name for step in made.steps if step.passed] == ["a wrong capability", "a killed peer"]


class Sabotage:
    """Sends a signal to one of the two processes of a trial as soon as it runs."""

    def __init__(self, side: str, number: signal.Signals) -> None:
        self.side, self.number = side, number
        self.pids: list[int] = []

    def __call__(self, child: Child) -> None:
        self.pids.append(child.pid)
        if child.name == self.side:
            threading.Timer(0.1, os.kill, (child.pid, self.number)).start()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_START_S", 3.0)
    monkeypatch.setattr(trial, "_SLACK_S", 0.5)
    monkeypatch.setattr(trial, "CONNECT_S", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("side", "number", "told"),
    [
        ("owner", signal.SIGKILL, "the owner died by SIGKILL in 'own'"),
        ("owner", signal.SIGSEGV, "the owner died by SIGSEGV in 'own'"),
        ("owner", signal.SIGSTOP, "the owner did not answer 'own' within 4 s"),
        ("reader", signal.SIGABRT, "the reader died by SIGABRT in 'connect'"),
        ("reader", signal.SIGSTOP, "the reader did not answer"),
    ],
)
def test_a_process_that_ends_or_hangs_is_a_finding(side: str, number: signal.Signals, told: str) -> None:
    sabotage = Sabotage(side, number)
    found = selftest.run(selftest.Options(Config(), ("zmq",)), lambda words: None, sabotage)
    (made,) = found.trials
    assert found.failed
    assert told in made.problem
    assert "--transport zmq" in made.remedy
    assert "Traceback" not in found.as_text()
    assert len(sabotage.pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in sabotage.pids), "every process was reaped"


def test_a_crash_comes_with_its_last_words() -> None:
    with Child("victim") as child:
        assert child.ask("look", 20, options={})["transports"]
        os.kill(child.pid, signal.SIGSEGV)
        with pytest.raises(
            trial.PeerLost, match=r"the victim died by SIGSEGV in 'look'.*its last words: .*Fatal Python"
        ):
            child.ask("look", 20, options={})


def test_what_a_process_says_of_itself() -> None:
    with Child("owner") as child:
        where = {"transport": "zmq", "options": {"hots": ""}, "memory": "host", "device": 0}
        with pytest.raises(trial.TransferFailed, match="did you mean 'host'"):
            child.ask("own", 20, seed=1, capability="00" * 16, **where)
        with pytest.raises(trial.TransferFailed, match="AttributeError"):
            child.ask("nonsense", 20)


def test_the_time_for_everything_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_LATEST_S", 0.0)
    found = run("zmq")
    assert found.failed, "nothing was tried"
    assert "run it alone" in found.unavailable[0].reason
    monkeypatch.undo()
    monkeypatch.setattr(selftest, "WHOLE_S", 0.0)
    found = run("zmq")
    assert found.failed
    assert "the time for the whole self-test was over before 'own'" in found.trials[0].problem


def test_looking_around_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_LOOK_S", 0.0)
    found = run()
    assert found.failed
    assert "did not answer 'look'" in found.rows[0].found
    assert json.loads(found.as_json())["failed"]


@pytest.fixture
def absent() -> str:
    with Child("process that looks around") as child:
        reasons = child.ask("look", SECONDS, options={})["transports"]
    names = [name for name in ("hixl", "hccl", "verbs") if reasons[name] is not None]
    if not names:
        pytest.skip("EVERY TRANSPORT IS AVAILABLE HERE")
    return names[0]


def test_devices_that_are_asked_for_and_absent_fail() -> None:
    found = run("zmq", devices=(5, 5))
    assert found.failed
    assert any("no memory of a device" in row.found for row in found.rows)


def test_a_transport_that_is_asked_for_and_absent_fails(absent: str) -> None:
    found = run(absent)
    assert found.failed
    (each,) = found.unavailable
    assert each.wanted
    assert each.reason in found.as_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--selftest", "--transport", "smh"), "shm"),
        (("--selftest", "--device", "a"), "0,1"),
        (("--selftest", "--device", "0,1,2"), "0,1"),
        (("--selftest", "--serve"), "--serve"),
        (("--selftest", "127.0.0.1:5"), "address"),
        (("--selftest", "--no-measure"), "--no-measure"),
        (("--transport", "shm"), "--selftest"),
        (("--device", "0"), "--selftest"),
    ],
)
def test_what_cannot_run(arguments: tuple[str, ...], told: str) -> None:
    done = pdc(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pdc doctor: ")
    assert told in line


def test_devices() -> None:
    assert selftest.parse_devices("3") == (3, 3)
    assert selftest.parse_devices("3,4") == (3, 4)
    with pytest.raises(ConfigError):
        selftest.parse_devices("-1")


def test_neither_torch_nor_vllm_is_loaded() -> None:
    probe = "import sys, pd_connector.doctor.selftest, pd_connector.doctor.worker; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert not set(done.stdout.split()) & {"torch", "vllm", "rich", "torch_npu"}
