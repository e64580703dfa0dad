"""Builds the emulated libcuda.so.1 under build/cuda where a source is newer: `python tests/cuda_emulated/build.py`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "ascend_emulated"
OUTPUT = HERE.parents[1] / "build" / "cuda"
LIBRARY = OUTPUT / "libcuda.so.1"
SOURCES = (*sorted(HERE.glob("*.c")), SHARED / "emu.c")
FLAGS = ("-std=c11", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-D_GNU_SOURCE", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror")
# Whoever emulates Ascend in the same process has faults of that name too: ours are our own.
LINKING = (f"-Wl,-soname,{LIBRARY.name}", "-Wl,-Bsymbolic", "-Wl,-z,defs")


def build() -> Path:
    """The library. Processes that build at the same time wait for one another."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (*SOURCES, HERE / "cuda_emu.h", SHARED / "emu.h", Path(__file__)))
        if not LIBRARY.exists() or LIBRARY.stat().st_mtime < newest:
            # A process that has the old one open keeps it: the new one takes its name when it is complete.
            fresh = LIBRARY.with_suffix(".new")
            compiler = os.environ.get("CC", "gcc")
            subprocess.run([compiler, *FLAGS, *WARNINGS, *map(str, SOURCES), "-o", str(fresh), *LINKING], check=True)
            fresh.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    try:
        print(build())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
