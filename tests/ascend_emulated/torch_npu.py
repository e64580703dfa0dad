"""Tensors of device "npu" without an NPU: what torch-npu gives a connector, in host memory. Emulated: nothing here has
run on hardware.

Named after the package that it stands in for. ``load()`` compiles npu_device.cpp once per source and torch version,
with the C++ compiler that is there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import threading
import types
from pathlib import Path
from typing import ClassVar

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("npu_device.cpp")
CACHE = Path(__file__).resolve().parents[2] / "build" / "ascend"
_COMPILE_SECONDS = 600


class Unavailable(Exception):
    """There is no compiler to make the device with."""


class Event:
    """Of the one stream that everything runs on: what was launched before is done when it is recorded, but for what
    ``busy`` holds up."""

    busy: ClassVar[threading.Event | None] = None
    """A device at work until this is set."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._busy: threading.Event | None = None

    def record(self) -> None:
        self._busy = Event.busy

    def query(self) -> bool:
        return self._busy is None or self._busy.is_set()

    def synchronize(self) -> None:
        if self._busy is not None:
            self._busy.wait()


@functools.cache
def load() -> torch.device:
    """The device, from now on known to torch in this process. Raises Unavailable."""
    torch.ops.load_library(str(_library()))
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device("npu:0")


def _library() -> Path:
    digest = hashlib.blake2b(SOURCE.read_bytes() + torch.__version__.encode(), digest_size=8).hexdigest()
    made = CACHE / f"npu_device-{digest}.so"
    if made.exists():
        return made
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler")
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = made.with_suffix(f".{os.getpid()}")  # another process may be making it as well
    paths = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
    order = [compiler, *flags, *paths, str(SOURCE), "-o", str(unfinished), "-lc10", "-ltorch_cpu"]
    done = subprocess.run(order, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    if done.returncode:
        raise Unavailable(f"{compiler} failed:\n{done.stderr[-4000:]}")
    unfinished.rename(made)
    return made


def _module() -> types.ModuleType:
    """What torch asks of a device: one of them, and no random numbers of its own."""
    module = types.ModuleType("torch.npu")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 1  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module.Event = Event  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]  # type: ignore[attr-defined]
    return module
