"""How fast do scattered blocks get from one process to another, beside the machine's own limit?

28 layers x (K, V) = 56 grids; random source blocks go to other random destination blocks, fresh ones each time, and
every byte is compared each time. The limit, scattered copies in a process of its own (benchmarks/limit.c), is measured
right before each iteration: t1 and t2 with memcpy by one and two threads, nt1 and nt2 with streaming stores. Memory is
`owned` (a shared pool that the reader maps) or `foreign` (any other). Transports over TCP are also measured beside two
bare lanes in C that move chunks of the same size (benchmarks/lanes.c), and, as root, between two network namespaces
(`--scope veth`).

    python benchmarks/bench_transport.py [--transport shm] [--memory owned] [--threads 1] [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import select
import subprocess
import sys
import tempfile
import time
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
import numpy as np
import veth

from pd_connector.memory import BlockGrid, Pool, Region
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.transport.base import LeaseId, Status, Transport
from pd_connector.transport.registry import load

GRIDS = 56
LEASE, CAPABILITY = LeaseId(1, 1), b"sixteen bytes..."
DEADLINE_S = 60.0
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def region(chunk: int, blocks: int, *, pooled: bool, huge: bool) -> tuple[Bytes, Region]:
    """Memory of GRIDS x 2 x ``blocks`` chunks, filled so that every chunk differs."""
    num_bytes = GRIDS * 2 * blocks * chunk
    if pooled:
        memory: Bytes = np.frombuffer(Pool(num_bytes), np.uint8)
    else:
        import mmap

        private = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        private.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        memory = np.frombuffer(private, np.uint8)
    size = 2 * blocks * chunk
    grids = tuple(BlockGrid(0, grid, grid * size, chunk, chunk, 2 * blocks) for grid in range(GRIDS))
    return memory, Region(memory.ctypes.data, num_bytes, grids, keepalive=memory)


def fill(memory: Bytes) -> None:
    words = memory.view(np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def serve(case: argparse.Namespace, chunk: int, blocks: int, pipe: Connection) -> None:
    if case.scope == "veth":
        veth.enter()
    transport = load(case.transport)("owner", options(case, veth.THERE))
    memory, mine = region(chunk, blocks, pooled=case.memory == "owned", huge=case.huge)
    fill(memory)
    transport.register([mine])
    transport.grant(LEASE, CAPABILITY, {0: np.arange(2 * blocks, dtype=np.uint32)})
    pipe.send(transport.describe())
    while pipe.recv():
        pipe.send(time.process_time())
    transport.close()


def options(case: argparse.Namespace, address: str) -> dict[str, Any]:
    threads = {} if case.transport == "zmq" else {"threads": case.threads}
    return threads | ({} if case.transport == "shm" else {"host": address if case.scope == "veth" else "127.0.0.1"})


def wait(transport: Transport, tag: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        select.select([transport.fileno()], [], [], 1.0)
        for completion in transport.poll(8):
            if completion.tag == tag and completion.status is Status.DONE:
                return
            raise RuntimeError(f"a read ended {completion}")
    raise TimeoutError(f"no completion within {DEADLINE_S} s")


def limits(case: argparse.Namespace, programs: Path, chunk: int, chunks: int) -> dict[str, float]:
    """GB/s of each limit, now."""
    memory = _run(programs / "limit", chunk, chunks, int(case.huge))
    found = dict(zip(("t1", "t2", "nt1", "nt2"), memory, strict=True))
    if case.transport != "shm":
        where = (veth.THERE, veth.PATH) if case.scope == "veth" else ("127.0.0.1",)
        found["lanes"] = _run(programs / "lanes", chunk, chunks, *where)[0]
    return found


def _run(*command: object) -> list[float]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    return [float(figure) for figure in done.stdout.split()]


def measure(case: argparse.Namespace, chunk: int, total: int, programs: Path) -> dict[str, Any]:
    blocks = max(1, total // chunk // GRIDS)
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    owner = spawn.Process(target=serve, args=(case, chunk, blocks, theirs), daemon=True)
    owner.start()
    theirs.close()
    reader = load(case.transport)("reader", options(case, veth.HERE))
    try:
        gbps, beside, cpu = iterate(case, chunk, blocks, programs, reader, pipe)
        pipe.send(False)
    finally:
        reader.close()
        owner.join(5)
        owner.kill()
    num_bytes = blocks * GRIDS * chunk
    spread = machine.spread(gbps)
    best = {name: float(np.median([figures[name] for figures in beside])) for name in beside[0]}
    return {
        "transport": case.transport,
        "scope": case.scope,
        "memory": case.memory,
        "pages": "huge" if case.huge else "4K",
        "chunk_bytes": chunk,
        "chunks": blocks * GRIDS,
        "bytes": num_bytes,
        "threads": case.threads,
        "rounds": case.rounds,
        **{f"gbps_{name}": value for name, value in spread.items()},
        **{f"limit_{name}_gbps": round(value, 3) for name, value in best.items()},
        **{f"ratio_{name}": round(spread["median"] / value, 3) for name, value in best.items()},
        "cpu_s_per_gb": round(cpu / (num_bytes * case.rounds) * 1e9, 3),
        "verified": True,
    }


def iterate(
    case: argparse.Namespace, chunk: int, blocks: int, programs: Path, reader: Transport, pipe: Connection
) -> tuple[list[float], list[dict[str, float]], float]:
    """(GB/s, limits) of each round and the CPU seconds of both processes in all of them."""
    memory, mine = region(chunk, blocks, pooled=False, huge=case.huge)
    expected = np.empty_like(memory)
    fill(expected)
    shape = (GRIDS, 2 * blocks, chunk)
    reader.register([mine])
    tags = count(1)
    reader.connect("owner", pipe.recv(), tag := next(tags))
    wait(reader, tag)
    patterns = tuple(Pattern(grid, grid, 0, 0, chunk) for grid in range(GRIDS))
    rng = np.random.default_rng()
    gbps, beside, cpu = [], [], 0.0
    for round_number in range(case.rounds + 1):
        source, target = (rng.permutation(2 * blocks)[:blocks] for _ in range(2))
        plan = CopyPlan(coalesce(source, target), patterns)
        memory[:] = 0xA5
        figures = limits(case, programs, chunk, blocks * GRIDS)
        pipe.send(True)
        used = pipe.recv() + time.process_time()
        start = time.perf_counter()
        reader.post_read("owner", LEASE, CAPABILITY, plan, tag := next(tags))
        wait(reader, tag)
        seconds = time.perf_counter() - start
        pipe.send(True)
        used = pipe.recv() + time.process_time() - used
        if not (memory.reshape(shape)[:, target] == expected.reshape(shape)[:, source]).all():
            raise RuntimeError("wrong bytes")
        if round_number:  # the first one finds pages that were never touched
            gbps.append(plan.num_bytes / seconds / 1e9)
            beside.append(figures)
            cpu += used
    return gbps, beside, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", choices=("shm", "tcp", "zmq"), default="shm")
    parser.add_argument("--scope", choices=("host", "veth"), default="host")
    parser.add_argument("--memory", choices=("owned", "foreign"), default="owned")
    parser.add_argument("--huge", action="store_true", help="huge pages under the reader's and foreign memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 32768, 65536, 262144, 1 << 20])
    parser.add_argument("--json", action="store_true", help="print one JSON object per case only")
    case = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory, veth.pair() if case.scope == "veth" else contextlib.nullcontext():
        programs, here = Path(directory), Path(__file__).parent
        build = [os.environ.get("CC", "cc"), "-D_GNU_SOURCE", "-std=gnu11", "-O3", "-pthread"]
        for name, more in (("limit", [here.parent / "csrc" / "copier_cpu.c"]), ("lanes", [])):
            subprocess.run([*build, here / f"{name}.c", *more, "-o", programs / name], check=True)
        for chunk in case.chunks:
            row = measure(case, chunk, (112 if chunk == 8192 else 224) << 20, programs)
            rows.append(row)
            if case.json:
                print(json.dumps(row), flush=True)
            else:
                names = [key.removeprefix("ratio_") for key in row if key.startswith("ratio_")]
                ratios = ", ".join(f"{row[f'ratio_{name}']:.2f} {name}" for name in names)
                spread = f"[{row['gbps_min']:.2f}-{row['gbps_max']:.2f}]"
                print(f"{chunk:8} {row['gbps_median']:6.2f} GB/s {spread}  {ratios}", flush=True)
    path = machine.write("transport", rows)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
