"""What this host lets a process have: descriptors, processors, memory, huge pages."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from pd_connector.doctor.report import Row, State

_DESCRIPTORS_PER_PEER = 5
"""Of a reader: four of the side channel, one for the data. Counted (Linux, libzmq 4.3.5)."""
_FEW_DESCRIPTORS = 1024
_LITTLE_MEMORY = 1 << 30
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CGROUP = Path("/sys/fs/cgroup")


def rows() -> list[Row]:
    return [
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        processors(len(os.sched_getaffinity(0)), os.cpu_count() or 1, read(_CGROUP / "cpu.max")),
        memory(
            read(Path("/proc/meminfo")),
            read(_CGROUP / "memory.max"),
            read(_CGROUP / "memory.current"),
        ),
        huge_pages(read(_HUGE_PAGES)),
    ]


def read(path: Path) -> str:
    """A file of the kernel's; empty where it does not exist or may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def open_files(soft: int, hard: int) -> Row:
    if soft == resource.RLIM_INFINITY:
        return Row("open files", State.OK, "no limit")
    found = f"limit {soft}: about {soft // _DESCRIPTORS_PER_PEER} peers over zmq"
    if soft >= _FEW_DESCRIPTORS:
        return Row("open files", State.OK, found)
    most = "more" if hard == resource.RLIM_INFINITY else str(hard)
    return Row("open files", State.WARN, found, f"ulimit -n {_FEW_DESCRIPTORS} or more (the hard limit is {most})")


def processors(allowed: int, present: int, quota: str) -> Row:
    """``quota`` is a control group's cpu.max: microseconds (or "max") in each period of so many microseconds."""
    found = f"{allowed} of {present} allowed"
    limit = re.fullmatch(r"(\d+) (\d+)", quota)
    share = float(allowed)
    if limit is not None:
        share = min(share, int(limit[1]) / int(limit[2]))
        found += f", the control group's quota is {int(limit[1]) / int(limit[2]):g}"
    if share >= 2:
        return Row("processors", State.OK, found)
    return Row("processors", State.WARN, found, "allow two or more: transports copy in threads beside the engine's")


def memory(meminfo: str, group_max: str, group_current: str) -> Row:
    """From /proc/meminfo and a control group's memory.max and memory.current, in bytes or "max"."""
    available = re.search(r"^MemAvailable: *(\d+) kB", meminfo, re.MULTILINE)
    left = [int(available[1]) << 10] if available else []
    if group_max.isdigit() and group_current.isdigit():
        left.append(max(0, int(group_max) - int(group_current)))
    if not left:
        return Row("memory", State.WARN, "/proc/meminfo does not say how much is available", "mount /proc")
    found = f"{min(left) / 2**30:.1f} GiB available"
    if min(left) >= _LITTLE_MEMORY:
        return Row("memory", State.OK, found)
    return Row("memory", State.WARN, found, "registered memory is committed at the start: leave room for all of it")


def huge_pages(setting: str) -> Row:
    """``setting`` lists the choices, the one in force in brackets."""
    chosen = re.search(r"\[(\w+)\]", setting)
    found = chosen[1] if chosen else "this kernel has none"
    if found in ("always", "madvise"):
        return Row("huge pages", State.OK, found)
    return Row("huge pages", State.WARN, found, f"echo madvise > {_HUGE_PAGES}: reads into 4 KiB pages take longer")
