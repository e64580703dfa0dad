"""``pdc bench transfer``: its cases and its words."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

from pd_connector.bench import veth
from pd_connector.bench.arguments import MIB, SMALL_CHUNK_MIB
from pd_connector.bench.case import Case
from pd_connector.bench.plot import plot
from pd_connector.bench.transfer import Beside, limits_of, measure
from pd_connector.errors import ConfigError, TransportUnavailable
from pd_connector.figure import load_pyplot
from pd_connector.transport.registry import load


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Raises ConfigError."""
    made = []
    for transport in arguments.transport:
        load(transport)  # before anything is measured
    for transport, memory, chunk in product(arguments.transport, arguments.memory, arguments.chunk):
        if transport != "shm" and memory != arguments.memory[0]:
            continue  # all memory is the same to a socket
        mib = arguments.mib if arguments.mib is not None else SMALL_CHUNK_MIB if chunk <= 8192 else MIB
        case = Case(
            transport=transport,
            scope=arguments.scope,
            memory=memory,
            huge=arguments.huge,
            threads=arguments.threads,
            pin=arguments.pin,
            chunk_bytes=chunk,
            num_bytes=mib << 20,
            rounds=arguments.rounds,
        )
        case.check()
        made.append(case)
    return made


def rows(arguments: argparse.Namespace, beside: Beside = limits_of) -> Iterator[dict[str, Any]]:
    """Measure and show every case. One that cannot be measured here is named on stderr; raises TransportUnavailable
    when that is all of them."""
    done = 0
    everything = cases(arguments)
    for number, case in enumerate(everything, 1):
        where = f"{case.transport}, {case.memory} memory, {case.chunk_bytes} bytes"
        print(
            f"case {number} of {len(everything)}: {where}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr
        )
        try:
            row = measure(case, beside)
        except TransportUnavailable as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        done += 1
        print(json.dumps(row) if arguments.json else line(row), flush=True)
        yield row
    if not done:
        raise TransportUnavailable(", ".join(arguments.transport), "nothing of it could be measured here, see above")


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    ratios = ", ".join(
        f"{value:.2f} {key.removeprefix('ratio_')}" for key, value in row.items() if key.startswith("ratio_")
    )
    speed = f"{row['gbps_median']:6.2f} GB/s [{row['gbps_min']:.2f} to {row['gbps_max']:.2f}]"
    what = f"{row['transport']:4} {row['memory']:7} {row['pages']:4} {row['chunk_bytes']:8}"
    return f"{what} {speed}  {row['cpu_s_per_gb']:.2f} CPU s/GB  {ratios}"


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None:
        load_pyplot()
        path = arguments.plot.absolute()
        if path.suffix not in (".png", ".svg", ".pdf") or not os.access(path.parent, os.W_OK):
            raise ConfigError(f"--plot {arguments.plot} cannot be written: name a .png, .svg or .pdf in your folder")
    with veth.pair() if arguments.scope == "veth" else contextlib.nullcontext():
        found = list(rows(arguments))
    if arguments.plot is not None:
        plot(found, arguments.plot)
    return 0
