"""Memory of an emulated GPU that an RDMA device takes as a dma-buf. The verbs are real, the GPU is not: not run on
hardware. ``python -m tests.rdma_vm.inside.gpu`` builds what it needs; LD_LIBRARY_PATH must name the folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cuda_emulated import build as emulated
from tests.cuda_emulated import device

SOURCE = Path(__file__).resolve().parents[1] / "dma_buf.c"
LIBRARY = emulated.OUTPUT.parent / "verbs" / "libibverbs.so.1"


def build() -> Path:
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        (real,) = Path("/usr/lib").glob("*/libibverbs.so.1")
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        words = [*emulated.FLAGS, *emulated.WARNINGS, f'-DREAL="{real}"', str(SOURCE), "-o", str(LIBRARY)]
        subprocess.run([os.environ.get("CC", "gcc"), *words, f"-Wl,-soname,{LIBRARY.name}"], check=True)
    return LIBRARY


HERE = str(LIBRARY.parent) in os.environ.get("LD_LIBRARY_PATH", "").split(":")
"""Whether this process's libibverbs takes dma-bufs."""


@contextmanager
def only_by_address() -> Iterator[None]:
    """As with a driver that gives no dma-bufs, and a peer-memory module."""
    device.faults("cuMemGetHandleForAddressRange:*=801")
    device.library().emu_peer_memory(1)
    try:
        yield
    finally:
        device.library().emu_peer_memory(0)
        device.faults("")


if __name__ == "__main__":
    print(build(), emulated.build())
