"""Builds the emulated libraries under build/ascend where a source is newer: `python tests/ascend_emulated/build.py`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "build" / "ascend"
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror")
FLAGS = ("-O1", "-g", "-fPIC", "-shared", "-pthread", "-D_GNU_SOURCE", "-fvisibility=hidden", *WARNINGS)


@dataclass(frozen=True)
class Library:
    name: str
    sources: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return OUTPUT / f"lib{self.name}.so"

    def command(self, into: Path) -> list[str]:
        is_cpp = self.sources[0].endswith(".cc")
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17"] if is_cpp else [os.environ.get("CC", "gcc"), "-std=c11"]
        linked = [f"-l{name}" for name in self.needs]
        # Beside one another: a test that opens one by its full path gets the emulated others too.
        linking = [f"-Wl,-soname,{self.path.name}", "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs", f"-L{OUTPUT}", *linked]
        return [*compiler, *FLAGS, *(str(HERE / source) for source in self.sources), "-o", str(into), *linking]


LIBRARIES = (
    Library("ascendcl", ("emu.c", "acl.c", "acl_memory.c", "acl_stream.c")),
    Library("metadef", ("ascend_string.cc",)),
    Library("cann_hixl", ("hixl.cc", "hixl_server.cc", "hixl_link.cc"), ("ascendcl", "metadef")),
    Library("hccl", ("hccl.c", "hccl_group.c"), ("ascendcl",)),
    # What lets ctypes call a C++ class; no vendor has it.
    Library("emu_hixl_c", ("hixl_c.cc",), ("cann_hixl", "metadef", "ascendcl")),
)


def newest_source() -> float:
    sources = [path for path in HERE.iterdir() if path.suffix in {".c", ".cc", ".h"}]
    return max(path.stat().st_mtime for path in (*sources, Path(__file__)))


def build() -> Path:
    """The folder for LD_LIBRARY_PATH. Processes that build at the same time wait for one another."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = newest_source()
        for library in LIBRARIES:
            if library.path.exists() and library.path.stat().st_mtime >= newest:
                continue
            # A process that has the old one open keeps it: the new one takes its name when it is complete.
            fresh = library.path.with_suffix(".new")
            subprocess.run(library.command(fresh), check=True)
            fresh.replace(library.path)
    return OUTPUT


if __name__ == "__main__":
    try:
        print(build())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
