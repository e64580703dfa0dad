"""How fast are scattered blocks read by RDMA, beside ib_read_bw in the same place?

On one host with a device, through it and back:

    python benchmarks/bench_rdma.py [--chunk 8192 32768] [--rails 1 2] [--verb read write] [--json] [--plot FILE]

Between two hosts, on the first one, then on the second one (its own address and the first one's, both of a network that
both reach; nothing of this is protected, so not on one that strangers reach):

    python benchmarks/bench_rdma.py --serve 10.0.0.1
    python benchmarks/bench_rdma.py --peer 10.0.0.1 --host 10.0.0.2

ib_read_bw (Debian: perftest) reads one buffer over and over, with as many queue pairs and requests in flight. Its round
runs right before each of ours. The report puts medians beside it and beside the ports' line rate.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import machine
import msgspec

from pd_connector.bench.case import Case
from pd_connector.bench.owner import Owner
from pd_connector.bench.plot import plot
from pd_connector.bench.transfer import measure
from pd_connector.errors import PDError, TransferFailed
from pd_connector.transport.rdma import Rail
from pd_connector.transport.verbs import VerbsOptions, usable

PORT, IB_PORT = 18600, 18601
QUEUES = 2
DEPTH = 128
"""Requests in flight per queue pair: what four slices of 1 MiB in blocks of 32 KiB are."""
STEP_S = 120.0


class FarOwner(Owner):
    """An owner on the other host: its input and output are a connection."""

    def __init__(self, address: str, case: Case) -> None:
        there = msgspec.structs.replace(case, host=address)
        self._connection = ask(address, {"case": msgspec.to_builtins(there)})
        self._file = self._connection.makefile("rwb", buffering=0)
        self._process = self  # type: ignore[assignment]
        self.stdin = self.stdout = self._file

    def kill(self) -> None:
        self._connection.close()

    def __exit__(self, kind: type[BaseException] | None, _: object, trace: TracebackType | None) -> None:
        self._file.close()
        self._connection.close()


def ask(address: str, request: Any) -> socket.socket:
    made = socket.create_connection((address, PORT), timeout=10)
    made.settimeout(STEP_S)
    made.sendall(json.dumps(request).encode() + b"\n")
    return made


def serve(address: str) -> None:
    listener = socket.create_server((address, PORT))
    print(f"serving at {address} port {PORT}; end with Ctrl-C", flush=True)
    while True:
        threading.Thread(target=_serve, args=(listener.accept()[0],), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    with connection, connection.makefile("rb", buffering=0) as file:
        request = json.loads(file.readline())
        if "case" in request:
            case = msgspec.convert(request["case"], Case)
            Owner.start(case, connection, connection).wait()
        else:
            _ib(request["ib"], request["rail"], ()).wait(STEP_S)


def _ib(arguments: list[str], rail: int, peer: tuple[str, ...]) -> subprocess.Popen[str]:
    """ib_read_bw over the rail of that number here: a server, or with ``peer`` its client."""
    here = usable(VerbsOptions())[rail]
    port = ["-d", here.port.device, "-i", str(here.port.number), "-x", str(here.gid.index), "-p", str(IB_PORT + rail)]
    return subprocess.Popen(
        ["ib_read_bw", *port, *arguments, *peer], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def beside(peer: str, rails: list[int], case: Case) -> Mapping[str, float]:
    """GB/s of ib_read_bw over all rails at once."""
    total = max(DEPTH * QUEUES, min(case.chunks, 5000) // len(rails))
    arguments = ["-s", str(case.chunk_bytes), "-n", str(total // QUEUES), "-q", str(QUEUES), "-t", str(DEPTH), "-F"]
    clients = []
    for rail in rails:
        if peer:
            ask(peer, {"ib": arguments, "rail": rail})
        else:
            _ib(arguments, rail, ())
        time.sleep(1.0)  # it does not say when it listens
        clients.append(_ib(arguments, rail, (peer or "127.0.0.1",)))
    found = 0.0
    for client in clients:
        out, _ = client.communicate(timeout=STEP_S)
        row = re.findall(rf"^\s*{case.chunk_bytes}\s+\d+\s+([\d.]+)\s+([\d.]+)", out, re.MULTILINE)
        if not row:
            raise TransferFailed(f"ib_read_bw: {out.strip()[-300:]}")
        found += float(row[-1][1]) * 2**20 / 1e9  # its MB are MiB
    return {"ib_read_bw": found}


def line_rate(rails: list[Rail]) -> float:
    """GB/s of these ports together, as the kernel says them; Soft-RoCE has none to speak of."""
    return sum(float(found[1]) / 8 for rail in rails if (found := re.match(r"([\d.]+) Gb/sec", rail.port.rate)))


def rows(options: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Raises PDError."""
    here = usable(VerbsOptions())
    found = []
    for count in options.rails:
        if count > len(here):
            say(f"{count} rails: this host has {len(here)}, left out")
            continue
        names = [f"{rail.port.name}:{rail.gid.index}" for rail in here[:count]]
        for verb in options.verb:
            for chunk in options.chunk:
                more = {"wire_verb": verb, "rails": count, "queue_pairs": QUEUES, "poll_us": options.poll_us}
                case = Case(
                    transport="verbs", chunk_bytes=chunk, num_bytes=options.mib << 20, rounds=options.rounds, huge=True,
                    memory="foreign", host=options.host, more=more,
                )  # fmt: skip
                start = partial(FarOwner, options.peer) if options.peer else Owner
                row = measure(case, partial(beside, options.peer, list(range(count))), start)
                rate = line_rate(here[:count])
                row |= {"case": f"{verb}, {chunk} bytes, {count} rails", "verb": verb, "rails": names}
                row |= {"line_rate_gbps": rate, "of_line_rate": round(row["gbps_median"] / rate, 4) if rate else None}
                say(f"{row['case']}: {row['gbps_median']} GB/s, {row['ratio_ib_read_bw']} of ib_read_bw")
                found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench_rdma", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--serve", default="", metavar="ADDRESS", help="be the first of two hosts")
    parser.add_argument("--peer", default="", metavar="ADDRESS", help="the first host")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="of this one, for --peer")
    parser.add_argument("--chunk", nargs="+", type=int, default=[8192, 32768, 65536, 1048576], metavar="BYTES")
    parser.add_argument("--rails", nargs="+", type=int, default=[1], metavar="COUNT")
    parser.add_argument("--verb", nargs="+", choices=("read", "write"), default=["read"])
    parser.add_argument("--poll-us", type=int, default=0, help="look for completions so long before waiting for them")
    parser.add_argument("--mib", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    if shutil.which("ib_read_bw") is None:
        print("bench_rdma: ib_read_bw is missing: apt install perftest", file=sys.stderr)
        return 1
    try:
        if options.serve:
            serve(options.serve)
        found = rows(options, lambda line: print(line, file=sys.stderr, flush=True))
    except PDError as error:
        print(f"bench_rdma: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    machine.report("rdma", found, as_json=options.json)
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
