"""``pdc doctor``: this host by itself. What is installed and allowed, and every transport between two processes."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

import pd_connector.errors
from pd_connector.config import Config, ascend_settings, is_loopback
from pd_connector.doctor import ascend, installation, limits, peer, rdma, server, symbols
from pd_connector.doctor.reach import beside
from pd_connector.doctor.report import Report, Row, State, TransportRow, Use
from pd_connector.errors import ConfigError, PDError, PeerLost
from pd_connector.runtime.courier import transport_options
from pd_connector.runtime.side_channel import advertised_host

_START_S = 20.0
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_STATUS = Path("/proc/self/status")


def examine(config: Config, path: Path | None, *, measure: bool = True) -> Report:
    """``path`` is where ``config`` comes from, None for the defaults."""
    report = Report([*installation.rows(), *limits.rows(), *rdma.rows(transport_options(config)["verbs"])])
    report.rows += ascend.rows(symbols.look(), (), ascend_settings())
    if path is not None:
        report.rows.append(configuration(config, path))
    # Neither keys nor addresses are tried here: both ends are ours.
    alone = msgspec.structs.replace(beside(config), public_key="", secret_key="", allowed_keys=())
    try:
        with _served(alone) as address:
            found = peer.examine(alone, address, measure=measure)
    except PDError as error:
        report.rows.append(Row("self-test", State.FAIL, str(error), "a process must reach another one on this host"))
        return report
    # Who answers is no news: it is a process of ours.
    report.rows += [
        row for row in found.rows if row.state is not State.OK or not row.name.startswith(("agent", "rank"))
    ]
    report.rows += _foreign(found.transports)
    report.transports = found.transports
    return report


def configuration(config: Config, path: Path) -> Row:
    """What a configuration that was accepted comes down to; keys are never shown."""
    try:
        told = advertised_host(config)
    except ConfigError as error:
        return Row("configuration", State.FAIL, f"{path}: {error}", "set `advertise`")
    transports = config.transport if isinstance(config.transport, str) else ", ".join(config.transport)
    keys = f"CURVE keys, {len(config.allowed_keys)} peers allowed" if config.secret_key else "no keys"
    words = f"{path}: host {config.host}, port {config.port}, peers are told {told}, {keys}, transport {transports}"
    if config.secret_key or is_loopback(config.host):
        return Row("configuration", State.OK, words)
    return Row("configuration", State.WARN, words, "anybody may talk to this address: set keys (`pdc keygen`)")


def _foreign(rows: list[TransportRow]) -> list[Row]:
    for row in rows:
        refused = row.transport == "shm" and row.state is Use.UNUSABLE and "process_vm_readv" in row.reason
        if row.agent == server.FOREIGN and refused:
            return [foreign_reads(row.reason, limits.read(_YAMA), limits.read(_STATUS))]
    return []


def foreign_reads(reason: str, yama: str, status: str) -> Row:
    """Why shm cannot read memory that is in no shared pool. ``yama``: ptrace_scope, empty without Yama; ``status``:
    this process's /proc status."""
    filtered = "\nSeccomp:\t2" in status
    pool = "else put the KV cache into shared_pool, or tcp is taken"
    if yama == "3":
        words, remedy = "Yama's ptrace_scope is 3", f"only a reboot without that setting ends it; {pool}"
    elif yama == "2":
        words, remedy = "Yama's ptrace_scope is 2", f"sysctl kernel.yama.ptrace_scope=1, or give CAP_SYS_PTRACE; {pool}"
    elif filtered:
        words = "a seccomp filter is in force"
        remedy = f"docker run --cap-add SYS_PTRACE, or a profile that allows process_vm_readv; {pool}"
    else:
        words, remedy = reason, f"run both as one user, or give CAP_SYS_PTRACE; {pool}"
    return Row("reads of private memory", State.WARN, f"shm may not (process_vm_readv): {words}", remedy)


@contextmanager
def _served(config: Config) -> Iterator[str]:
    """The address of a child process of ours that serves test memory. Raises PeerLost."""
    process = subprocess.Popen(
        [sys.executable, "-m", server.__name__, msgspec.json.encode(config).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for us; we end it
        cwd=Path(pd_connector.errors.__file__).parents[1],  # found there even when the package is not installed
    )
    try:
        yield _address(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _address(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    end = time.monotonic() + _START_S
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        more = os.read(process.stdout.fileno(), 4096) if ready else b""
        if not more:
            raise PeerLost(f"a child process of ours did not say its address within {_START_S:g} s, or ended")
        line += more
    said: dict[str, str] = json.loads(line)
    if "error" in said:
        raise PeerLost(f"a child process of ours cannot serve: {said['error']}")
    return said["address"]
