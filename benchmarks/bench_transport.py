"""How fast do scattered blocks get from one process to another, beside the machine's limit and beside other libraries?

The engine and the options are those of `pdc bench transfer`; every row also goes to results/transport.jsonl with the
machine it was measured on. Right before each of our reads the same chunks are moved by

- scattered copies in a process of its own (t1, t2: memcpy by one and two threads; nt1, nt2: streaming stores),
- for sockets: two bare lanes in C without any protocol (lanes.c), and `iperf3 -P 2` where it is installed,
- with `--rivals`: NIXL and Mooncake (rivals/venvs.py installs them), stopped while anything else is measured.

    python benchmarks/bench_transport.py [--rivals] [--transport shm ...] [--json] [--plot FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import machine
from rivals.rival import Rival, rivals_here

from pd_connector.bench import veth
from pd_connector.bench.arguments import add_arguments
from pd_connector.bench.case import Case
from pd_connector.bench.command import rows
from pd_connector.bench.transfer import limits_of

HERE = Path(__file__).parent
DEADLINE_S = 60.0


class Beside:
    """Everything that a case is measured beside; what has processes of its own is started once per case."""

    def __init__(self, lanes: Path, *, rivals: bool) -> None:
        self._lanes, self._rivals = lanes, rivals
        self._case: Case | None = None
        self._running: dict[str, Rival] = {}
        self._stack = contextlib.ExitStack()
        self.cpu: dict[str, list[float]] = {}
        """CPU seconds per GB, both ends together, of each round of this case."""

    def __call__(self, case: Case) -> Mapping[str, float]:
        if case is not self._case:
            self.close()
            self._case, self.cpu = case, {}
            for name, variant in rivals_here() if self._rivals else ():
                rival = Rival(name, variant, case.scope, case.chunk_bytes, case.blocks, case.huge)
                self._running[f"{name}_{variant}"] = self._stack.enter_context(rival)
        found = dict(limits_of(case))
        if case.transport != "shm":
            found["lanes"], cpu = self._bare_lanes(case)
            self.cpu.setdefault("lanes", []).append(cpu)
            if shutil.which("iperf3"):
                found["iperf3"] = iperf3(case)
        for name, rival in self._running.items():
            sample = rival.iterate()
            found[name] = sample.gbps
            self.cpu.setdefault(name, []).append(sample.cpu_s_per_gb)
        return found

    def close(self) -> None:
        self._stack.close()
        self._running.clear()

    def _bare_lanes(self, case: Case) -> tuple[float, float]:
        where = (veth.THERE, veth.PATH) if case.scope == "veth" else ("127.0.0.1",)
        speed, cpu = _output(self._lanes, case.chunk_bytes, case.chunks, int(case.pin), *where).split()
        return float(speed), float(cpu)


def iperf3(case: Case) -> float:
    """GB/s of one second over two streams, received; not of chunks."""
    inside = ["ip", "netns", "exec", veth.SPACE] if case.scope == "veth" else []
    address = veth.THERE if case.scope == "veth" else "127.0.0.1"
    server = subprocess.Popen(
        [*inside, "iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for attempts_left in reversed(range(20)):
            time.sleep(0.1)  # until it listens
            try:
                result = json.loads(_output("iperf3", "-c", address, "-P", 2, "-t", 1, "-R", "-J"))
                break
            except subprocess.CalledProcessError:
                if not attempts_left:
                    raise
    finally:
        server.kill()
        server.wait()
    return float(result["end"]["sum_received"]["bits_per_second"]) / 8e9


def _output(*command: object) -> str:
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=DEADLINE_S).stdout


def build(directory: Path) -> Path:
    program = directory / "lanes"
    compiler = [os.environ.get("CC", "cc"), "-D_GNU_SOURCE", "-std=gnu11", "-O3", "-pthread"]
    subprocess.run([*compiler, HERE / "lanes.c", "-o", program], check=True)
    return program


def plotter(path: Path | None) -> Callable[[list[dict[str, object]], Path], None] | None:
    if path is None:
        return None
    from pd_connector.bench.plot import plot

    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add_arguments(parser)
    parser.add_argument("--rivals", action="store_true", help="beside NIXL and Mooncake too, where they are installed")
    arguments = parser.parse_args()
    plot = plotter(arguments.plot)
    done = []
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        if arguments.scope == "veth":
            stack.enter_context(veth.pair())
        beside = Beside(build(Path(directory)), rivals=arguments.rivals)
        stack.callback(beside.close)
        for row in rows(arguments, beside):
            # The first round is no part of ours either.
            cpu = {f"cpu_s_per_gb_{name}": round(statistics.median(all_[1:]), 3) for name, all_ in beside.cpu.items()}
            done.append(row | cpu)
            path = machine.write("transport", done[-1:])
            if cpu and not arguments.json:
                print("     CPU s/GB of others:", ", ".join(f"{key[13:]} {value:.2f}" for key, value in cpu.items()))
    if plot is not None:
        plot(done, arguments.plot)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
