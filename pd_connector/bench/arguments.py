"""Options of ``pdc bench transfer``; imports nothing that takes time."""

from __future__ import annotations

import argparse
from pathlib import Path

CHUNKS = (8192, 32768, 65536, 262144, 1 << 20)
SMALL_CHUNK_MIB, MIB = 112, 224
"""Of a read of 8 KiB chunks, and of any other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", nargs="+", default=["shm", "tcp", "zmq"], metavar="NAME")
    parser.add_argument(
        "--scope", choices=("host", "veth"), default="host", help="veth: two network namespaces, as root"
    )
    parser.add_argument(
        "--memory",
        nargs="+",
        choices=("owned", "foreign"),
        default=["owned", "foreign"],
        help="a pool that a reader of the same host maps, or any other memory (makes a difference to shm only)",
    )
    parser.add_argument("--huge", action="store_true", help="all memory in huge pages, as agents make it")
    parser.add_argument("--threads", type=int, default=2, help="of a native transport (default: %(default)s)")
    parser.add_argument("--pin", action="store_true", help="each of them stays on one processor")
    parser.add_argument("--chunk", type=int, nargs="+", default=list(CHUNKS), metavar="BYTES")
    parser.add_argument("--mib", type=int, help=f"per read (default: {MIB}, or {SMALL_CHUNK_MIB} of 8 KiB chunks)")
    parser.add_argument("--rounds", type=int, default=7, help="per case (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per case, and nothing else, on stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results into a PNG or SVG")
