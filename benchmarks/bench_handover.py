"""How fast does D get P's KV blocks through real vLLM, beside a bare pyzmq sender of the same frames?

One P and one D (real vLLM on CPU, one core each), a model with 56 KiB of KV per token, prompts of 4,096 tokens: 235 MB
each. Every hand-over is followed by one run of two bare processes on the same two cores that send and receive the same
frames with pyzmq: zero-copy, the receiver drops them, so one copy less than a hand-over needs. How many frames of which
size comes from P's own counters: blocks that are neighbours in memory travel as one frame. A second bare pair sends one
frame per block and layer. Ratios are of medians.

    python benchmarks/bench_handover.py [--transport zmq|shm] [--rounds 7] [--tokens 4096] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
import numpy as np
import zmq

from pd_connector.demo.instance import Instance, vllm_instance
from pd_connector.demo.model import WIDE_KV, build_model

BLOCK_TOKENS = 128
SPARE_BLOCKS = 8
"""Beyond one request's. With a big cache every request gets blocks that nobody touched for a minute, to which first
writes ran at 2.4 to 3.4 GB/s here instead of 26, whoever made them (a virtual machine: its host may be the cause)."""
READY_SECONDS = 600.0


def bare_sender(frames: int, frame_bytes: int, port: Connection, core: int) -> None:
    os.sched_setaffinity(0, [core])
    memory = memoryview(np.random.default_rng(0).integers(0, 255, frames * frame_bytes, np.uint8))
    socket = zmq.Context().socket(zmq.PAIR)
    port.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    socket.recv()
    for start in range(0, len(memory), frame_bytes):
        socket.send(memory[start : start + frame_bytes], copy=False)
    socket.recv()


def bare_receiver(frames: int, port: int, result: Connection, core: int) -> None:
    os.sched_setaffinity(0, [core])
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(f"tcp://127.0.0.1:{port}")
    time.sleep(0.2)
    start = time.perf_counter()
    socket.send(b"go")
    total = sum(len(socket.recv(copy=False)) for _ in range(frames))
    result.send(total / (time.perf_counter() - start) / 1e9)
    socket.send(b"done")
    time.sleep(0.1)


def bare_gbps(frames: int, frame_bytes: int) -> float:
    """One run of the bare pair, in GB/s."""
    spawn = multiprocessing.get_context("spawn")
    port, port_out = spawn.Pipe(False)
    result, result_out = spawn.Pipe(False)
    sender = spawn.Process(target=bare_sender, args=(frames, frame_bytes, port_out, 0))
    sender.start()
    receiver = spawn.Process(target=bare_receiver, args=(frames, port.recv(), result_out, 1))
    receiver.start()
    try:
        if not result.poll(60):
            raise TimeoutError("the bare pyzmq pair did not finish within 60 s")
        return float(result.recv())
    finally:
        for process in (sender, receiver):
            process.join(5)
            process.kill()


def cpu_seconds(instance: Instance) -> float:
    """CPU time of an instance's process group so far."""
    assert instance.process is not None
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == instance.process.pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def frames_served(instance: Instance) -> float:
    """Frames of block memory that P has sent."""
    events = instance.metrics()
    return sum(value for key, value in events.items() if "events_total{" in key and '"zmq_frames_served"' in key)


def hand_over(p: Instance, d: Instance, tokens: int, seed: int) -> dict[str, float]:
    """One request through P and D, as a router would send it. Times in seconds."""
    chance = random.Random(seed)
    prompt = [chance.randrange(WIDE_KV.vocabulary - 3) for _ in range(tokens)]
    body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    before, served, cpu = d.metrics(), frames_served(p), cpu_seconds(p) + cpu_seconds(d)
    start = time.perf_counter()
    first = p.post("/v1/completions", {**body, "kv_transfer_params": {"do_remote_decode": True}})
    middle = time.perf_counter()
    d.post("/v1/completions", {**body, "kv_transfer_params": first["kv_transfer_params"]})
    end = time.perf_counter()
    cpu = cpu_seconds(p) + cpu_seconds(d) - cpu
    deadline = time.monotonic() + 10
    while True:
        after = d.metrics()
        delta = {key: after.get(key, 0.0) - before.get(key, 0.0) for key in after}
        if delta.get("vllm:pdc_bytes_transferred_sum"):
            break
        if time.monotonic() > deadline:
            raise RuntimeError("D reports no bytes: it did not read P's blocks")
        time.sleep(0.1)
    moved = delta["vllm:pdc_bytes_transferred_sum"]
    return {
        "bytes": moved,
        "connect": delta["vllm:pdc_connect_time_seconds_sum"],
        "wire": delta["vllm:pdc_xfer_time_seconds_sum"],
        "commit": delta["vllm:pdc_commit_time_seconds_sum"],
        "p_leg": middle - start,
        "d_leg": end - middle,
        "cpu": cpu,
        "frames": frames_served(p) - served,
        "gbps": moved / delta["vllm:pdc_xfer_time_seconds_sum"] / 1e9,
    }


def small_cache(tokens: int) -> list[str]:
    """Options of vLLM for a cache of one request and SPARE_BLOCKS."""
    blocks = -(-tokens // BLOCK_TOKENS) + SPARE_BLOCKS
    return ["--num-gpu-blocks-override", str(blocks), "--max-model-len", str(tokens + BLOCK_TOKENS)]


def measure(transport: str, rounds: int, tokens: int, directory: Path) -> dict[str, Any]:
    model = build_model(directory / "model", WIDE_KV)
    extra = {"transport": transport}
    cache = small_cache(tokens)
    p = vllm_instance("P", model, directory / "p.log", role="kv_producer", core=0, extra=extra, arguments=cache)
    d = vllm_instance("D", model, directory / "d.log", role="kv_consumer", core=1, extra=extra, arguments=cache)
    block_bytes = BLOCK_TOKENS * WIDE_KV.kv_bytes_per_token // WIDE_KV.layers
    blocks = -(-tokens // BLOCK_TOKENS) * WIDE_KV.layers
    try:
        p.start()
        d.start()
        for instance in (p, d):
            instance.wait_ready(READY_SECONDS)
            # vLLM's own first request is slow whatever the connector: it is not what is asked here.
            instance.post("/v1/completions", {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 2})
        ours, bare, blockwise = [], [], []
        for round_number in range(rounds + 1):
            ours.append(hand_over(p, d, tokens, round_number))
            frames = int(ours[-1]["frames"]) or blocks
            bare.append(bare_gbps(frames, int(ours[-1]["bytes"]) // frames))
            blockwise.append(bare_gbps(blocks, block_bytes))
            print(
                f"round {round_number}: {ours[-1]['gbps']:.2f} GB/s in {frames} frames, bare {bare[-1]:.2f}, "
                f"bare per block {blockwise[-1]:.2f}",
                file=sys.stderr,
            )
    finally:
        p.stop()
        d.stop()
    first, later = ours[0], ours[1:]
    seconds = [row["connect"] + row["wire"] + row["commit"] for row in later]
    row = {
        "case": f"vllm 1P1D, sequential, {transport}",
        "tokens": tokens,
        "bytes": int(first["bytes"]),
        "frames": [int(r["frames"]) for r in later],
        "rounds": rounds,
        "gbps": machine.spread([r["gbps"] for r in later]),
        "bare_gbps": machine.spread(bare[1:]),
        "bare_per_block_gbps": machine.spread(blockwise[1:]),
        "transfer_ms": machine.spread([1e3 * s for s in seconds], 1),
        "commit_ms": machine.spread([1e3 * r["commit"] for r in later], 2),
        "p_leg_ms": machine.spread([1e3 * r["p_leg"] for r in later], 0),
        "d_leg_ms": machine.spread([1e3 * r["d_leg"] for r in later], 0),
        "cpu_s_both": machine.spread([r["cpu"] for r in later], 2),
        "first_d_leg_ms": round(1e3 * first["d_leg"]),
        "first_transfer_ms": round(1e3 * (first["connect"] + first["wire"] + first["commit"]), 1),
    }
    row["ratio_to_bare"] = round(row["gbps"]["median"] / row["bare_gbps"]["median"], 3)
    row["ratio_to_bare_per_block"] = round(row["gbps"]["median"] / row["bare_per_block_gbps"]["median"], 3)
    total = [r["p_leg"] + r["d_leg"] for r in later]
    row["first_to_later"] = round((first["p_leg"] + first["d_leg"]) / machine.spread(total)["median"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", choices=("zmq", "shm"), default="zmq")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="print the row as JSON only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        row = measure(arguments.transport, arguments.rounds, arguments.tokens, Path(directory))
    path = machine.write("handover", [row])
    if arguments.json:
        print(json.dumps(row))
        return
    for key, value in row.items():
        print(f"{key:18} {value}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
