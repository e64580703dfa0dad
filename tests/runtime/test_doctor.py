"""``pdc doctor`` between real processes: this host, a peer, test memory that is served, and peers that are no such."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import z85

import pd_connector
from pd_connector import Agent, Config, LeaseExpired
from pd_connector.doctor.link import Target
from pd_connector.doctor.peer import lease_ticket
from pd_connector.doctor.server import serve
from pd_connector.memory import native
from pd_connector.protocol.messages import VERSION
from pd_connector.transport.registry import ORDER

from .test_agent import QUICK

PACKAGE = Path(pd_connector.__file__).parent
BEST = "zmq" if native() is None else "shm"
SECONDS = 50

# A real agent; a plan of its arguments, then its address, then nothing until its stdin ends.
PEER = """
import asyncio, sys
import numpy as np
from pd_connector import Agent, Config
from pd_connector.protocol.messages import Endpoint

async def main(kind):
    async with Agent(Config(model="toy"), name="the-peer") as agent, Agent(name="the-rank") as rank:
        memory = np.zeros((4, 8, 4096), np.uint8)
        if kind == "memory":
            agent.register(list(memory))
        if kind == "ranks":
            rank.register(list(memory))
            first = rank.endpoint(0)
            others = [Endpoint(1, "tcp://127.0.0.1:9", 5, first.layout), Endpoint(2, rank.address, 5, first.layout)]
            agent.speak_for([first, *others])
        print(agent.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(sys.argv[1]))
"""


# As a container's seccomp profile: process_vm_readv is not permitted, to this process and those that it starts.
FORBIDDEN = """
import ctypes, struct, sys
from pd_connector import cli

call, libc = int(sys.argv.pop(1)), ctypes.CDLL(None, use_errno=True)
program = b"".join(
    struct.pack("HBBI", *line)
    for line in ((0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000))
)
text = ctypes.create_string_buffer(program, len(program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(text)), 16)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0, ctypes.get_errno()
sys.exit(cli.main())
"""
PROCESS_VM_READV = {"x86_64": "310", "aarch64": "270"}


def pdc(
    *arguments: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pd_connector.cli", "doctor", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, cwd=cwd, env=environment
    )


def examined(*arguments: str | Path, status: int = 0, cwd: Path | None = None) -> tuple[dict[str, Any], list[Any]]:
    """The rows by name and the transports of a doctor that ended so."""
    done = pdc(*arguments, "--json", cwd=cwd)
    assert (done.returncode, done.stderr) == (status, ""), done
    told = json.loads(done.stdout)
    assert set(told) == {"rows", "transports"}
    rows = {row["name"]: row for row in told["rows"]}
    assert len(rows) == len(told["rows"])
    return rows, told["transports"]


def refused(*arguments: str | Path) -> str:
    """The one line of a doctor that could not run."""
    done = pdc(*arguments, "--json")
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("pdc doctor: ")
    return line


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and the first line that it says."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline().strip()
        assert line, process.stderr.read()
        yield process, line
    finally:
        process.kill()
        process.communicate()


def serving(*arguments: str | Path) -> contextlib.AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    return running("-m", "pd_connector.cli", "doctor", "--serve", *map(str, arguments))


def keyed(path: Path, *, allowed: str, pair: tuple[str, str]) -> Path:
    path.write_text(json.dumps({"public_key": pair[0], "secret_key": pair[1], "allowed_keys": [allowed]}))
    return path


def key_pair() -> tuple[str, str]:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return public, secret


# --- this host --------------------------------------------------------------------------------------------------------


def test_this_host() -> None:
    rows, transports = examined()
    assert {"pd_connector", "libzmq", "C extension", "vLLM", "vLLM plugin", "open files", "processors"} < set(rows)
    assert rows["memory of owned"]["found"].startswith(BEST)
    assert "every byte is right" in rows["hand-over"]["found"]
    found = {(row["agent"], row["transport"]): row for row in transports}
    assert set(found) == {(agent, name) for agent in ("owned", "foreign") for name in ORDER}
    assert found["owned", BEST]["state"] == "chosen"
    assert "process" in found["owned", "inproc"]["reason"]
    for row in transports:
        works = row["state"] in ("chosen", "usable")
        assert works == (row["gbps"] is not None) == (row["latency_us"] is not None), row
        assert works or row["reason"]


def test_this_host_for_people_and_without_reading(tmp_path: Path) -> None:
    public, secret = key_pair()
    config = keyed(tmp_path / "agent.json", allowed=public, pair=(public, secret))
    done = pdc("--config", config, "--no-measure")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["check", "state", "found"] in lines
    assert "CURVE keys, 1 peers allowed" in done.stdout
    assert secret not in done.stdout
    assert next(line for line in lines if line[:3] == ["owned", BEST, "chosen"])[-1] == "ms"
    assert "hand-over" not in done.stdout


def test_without_the_extension(tmp_path: Path) -> None:
    copy = tmp_path / "pd_connector"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # One that does not load, as on another platform: an editable install would find the right one all the same.
    (copy / "_native.py").write_text("raise ImportError('for another platform')\n")
    rows, transports = examined(cwd=tmp_path)
    assert rows["C extension"]["state"] == "warn"
    assert "PD_NATIVE=require pip install" in rows["C extension"]["remedy"]
    found = {row["transport"]: row for row in transports if row["agent"] == "owned"}
    assert found["zmq"]["state"] == "chosen"
    assert {found[name]["state"] for name in ("shm", "tcp")} == {"unusable"}
    assert "C extension is not installed" in found["shm"]["reason"]


@pytest.mark.skipif(native() is None, reason="the C extension was not built")
@pytest.mark.skipif(platform.machine() not in PROCESS_VM_READV, reason="its number is not known here")
def test_where_reads_of_other_processes_are_forbidden() -> None:
    command = [sys.executable, "-c", FORBIDDEN, PROCESS_VM_READV[platform.machine()], "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    (row,) = (row for row in told["rows"] if row["name"] == "reads of private memory")
    assert row["state"] == "warn"
    assert "seccomp" in row["found"]
    assert "SYS_PTRACE" in row["remedy"]
    chosen = {row["agent"]: row["transport"] for row in told["transports"] if row["state"] == "chosen"}
    assert chosen == {"owned": "shm", "foreign": "tcp"}


def test_a_transport_that_does_not_exist_here_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text('{"transport": ["inproc"]}')
    rows, transports = examined("--config", tmp_path / "agent.json", "--no-measure", status=1)
    assert rows["memory of owned"]["state"] == "fail"
    assert {row["transport"] for row in transports} == {"inproc"}


def test_neither_torch_nor_vllm_is_loaded() -> None:
    probe = "import sys, pd_connector.cli as c; c.main(['doctor', '--no-measure']); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=SECONDS, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "pd_connector.doctor.host" in loaded
    assert not loaded & {"torch", "vllm", "rich"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nonsense",), "HOST:PORT"),
        (("--config", "gone.json"), "gone.json"),
        (("--serve", "127.0.0.1:5"), "--serve"),
        (("--serve", "--no-measure"), "--no-measure"),
    ],
)
def test_what_cannot_run(arguments: tuple[str, ...], told: str) -> None:
    assert told in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "told"), [('{"hots": ""}', "'host'"), ('{"host": "0.0.0.0"}', "keygen"), ('{"transport": "smh"}', "shm")]
)
def test_a_configuration_that_cannot_be(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text(text)
    done = pdc("--config", tmp_path / "agent.json")
    assert done.returncode
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# --- a peer -----------------------------------------------------------------------------------------------------------


def test_an_agent_with_memory() -> None:
    with running("-c", PEER, "memory") as (_, address):
        rows, transports = examined(address.removeprefix("tcp://"))
    assert "the-peer at tcp://127.0.0.1:" in rows["agent"]["found"]
    assert f"model 'toy', protocol version {VERSION}" in rows["agent"]["found"]
    assert "4 layers" in rows["rank 0"]["found"]
    assert rows["memory of the-peer"]["found"].startswith(BEST)
    assert "over 20 HELLOs" in rows["round trip"]["found"]
    assert "pdc doctor --serve" in rows["speed"]["found"]
    found = {row["transport"]: row for row in transports}
    assert found[BEST]["state"] == "chosen"
    assert found[BEST]["connect_ms"] is not None
    assert found[BEST]["gbps"] is None
    assert found["inproc"]["state"] == "unusable"


def test_an_agent_without_memory() -> None:
    with running("-c", PEER, "nothing") as (_, address):
        rows, transports = examined(address)
    assert "none" in rows["memory"]["found"]
    assert transports == []


def test_another_model(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text('{"model": "other"}')
    with running("-c", PEER, "memory") as (_, address):
        rows, _ = examined(address, "--config", tmp_path / "agent.json", status=1)
    assert "ours 'other', theirs 'toy'" in rows["model"]["found"]


def test_every_rank_is_asked() -> None:
    with running("-c", PEER, "ranks") as (_, address):
        rows, transports = examined(address, status=1)
    assert "4 layers" in rows["rank 0"]["found"]
    assert "tcp://127.0.0.1:9 cannot be connected to" in rows["rank 1"]["found"]
    assert "another agent answers" in rows["rank 2"]["found"]
    assert {row["agent"] for row in transports} == {"the-rank"}


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        line = refused(f"127.0.0.1:{free.getsockname()[1]}")
    assert "refused" in line
    assert "does it run" in line


def test_something_that_is_no_agent() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        line = refused(f"127.0.0.1:{silent.getsockname()[1]}")
    assert "does not answer HELLO" in line


# --- test memory ------------------------------------------------------------------------------------------------------


def test_what_is_served_can_be_measured_again_and_again() -> None:
    with serving() as (process, line):
        program, command, address = line.split()
        assert (program, command) == ("pdc", "doctor")
        rows, transports = examined(address)
        assert "every byte is right" in rows["hand-over"]["found"]
        assert {row["agent"] for row in transports} == {"owned", "foreign"}
        assert {row["state"] for row in transports if row["transport"] == "zmq"} == {"usable" if native() else "chosen"}
        assert all(row["gbps"] and row["latency_us"] for row in transports if row["transport"] in (BEST, "zmq"))
        asyncio.run(readers(address, 100))
        rows, _ = examined(address)
        assert "every byte is right" in rows["hand-over"]["found"]
        assert process.poll() is None


async def readers(address: str, number: int) -> None:
    """So many agents, each by another name, pull and confirm one block."""
    async with Agent(name="asks") as asks:
        incarnation = await incarnation_at(asks, address)
    target = Target()
    for index in range(number):
        async with Agent(Config(transport="zmq"), name=f"reader-{index}", limits=QUICK) as agent:
            agent.register([target.cache.region])
            ticket = lease_ticket(address, incarnation)
            stats = await agent.pull(ticket, [index % 16], skip_blocks=index % 16, partial=True, timeout=10)
            assert stats.bytes > 0


async def incarnation_at(agent: Agent, address: str) -> int:
    from pd_connector.doctor.greeting import meet

    return (await meet(agent.config, address)).speaker.welcome.src


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_with_a_signal(number: signal.Signals) -> None:
    with serving("--json") as (process, line):
        assert json.loads(line)["address"].startswith("tcp://127.0.0.1:")
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


def test_serving_at_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "agent.json").write_text(json.dumps({"port": port}))
        assert f"port {port}" in refused("--serve", "--config", tmp_path / "agent.json")


async def test_serving_ends_when_somebody_takes_the_lease_away() -> None:
    address: asyncio.Queue[str] = asyncio.Queue()
    served = asyncio.create_task(serve(Config(transport="zmq"), address.put_nowait, asyncio.Event()))
    async with asyncio.timeout(20), Agent() as agent:
        from pd_connector.doctor.greeting import Greeting, meet

        rank = (await meet(Config(), await address.get())).ranks[0]
        assert isinstance(rank, Greeting)
        agent.release(lease_ticket(rank.address, rank.welcome.src), whole=True)
        with pytest.raises(LeaseExpired, match="start it again"):
            await served


def test_keys(tmp_path: Path) -> None:
    ours, theirs, strange = key_pair(), key_pair(), key_pair()
    there = keyed(tmp_path / "there.json", allowed=ours[0], pair=theirs)
    here = keyed(tmp_path / "here.json", allowed=theirs[0], pair=ours)
    stranger = keyed(tmp_path / "stranger.json", allowed=theirs[0], pair=strange)
    with serving("--config", there) as (_, line):
        address = line.split()[2]
        assert line.endswith("--config FILE")
        rows, _ = examined(address, "--config", here)
        assert "every byte is right" in rows["hand-over"]["found"]
        assert "keys" in refused(address)
        plain = address.partition("#")[0]
        assert "keys" in refused(plain, "--config", here)
        words = refused(plain)
        assert "keys" in words
        assert "allowed_keys" not in words, "we have none that could be added there"
        assert "add our public_key to its allowed_keys" in refused(address, "--config", stranger)
        wrong = f"{plain}#{z85.decode(strange[0].encode()).hex()}"
        assert "not in allowed_keys" in refused(wrong, "--config", here)
        mistaken = keyed(tmp_path / "mistaken.json", allowed=strange[0], pair=ours)
        assert "cannot be greeted" in refused(wrong, "--config", mistaken)
