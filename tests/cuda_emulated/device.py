"""Memory of an emulated GPU. Not run on hardware: the library is tests/cuda_emulated's own."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from functools import cache

import numpy as np

from pd_connector.memory import MemoryKind
from pd_connector.testing.arena import Placed

from .build import build

THINGS = ("allocations", "opened", "pinned", "streams", "modules", "contexts")


@cache
def library() -> ctypes.CDLL:
    """The emulated driver, in this process and, by name, in those that it starts."""
    path = build()
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if str(path.parent) not in paths:
        os.environ["LD_LIBRARY_PATH"] = ":".join([str(path.parent), *filter(None, paths)])
    cuda = ctypes.CDLL(str(path))
    cuda.emu_alias.restype = ctypes.c_void_p
    cuda.emu_alias.argtypes = [ctypes.c_void_p]
    cuda.emu_calls.restype = ctypes.c_uint64
    cuda.emu_calls.argtypes = cuda.emu_faults.argtypes = [ctypes.c_char_p]
    cuda.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    cuda.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    assert cuda.cuInit(0) == 0
    return cuda


def faults(spec: str) -> None:
    """As tests/ascend_emulated/emu.h says; "" ends them, and the counts of calls begin again."""
    assert library().emu_faults(spec.encode()) == 0


def things() -> dict[str, int]:
    """What was made and not given back yet, by anybody who still has it."""
    gc.collect()
    return {name: library().emu_things(index) for index, name in enumerate(THINGS)}


@cache
def context(device: int) -> int:
    """The primary context, as an engine keeps it."""
    found = ctypes.c_void_p()
    assert library().cuDevicePrimaryCtxRetain(ctypes.byref(found), device) == 0
    assert found.value is not None
    return found.value


def gpu(num_bytes: int, device: int = 0) -> Placed:
    """Of device 0; the processor cannot touch its address, but sees the bytes through another mapping."""
    cuda, at = library(), ctypes.c_uint64()
    assert cuda.cuCtxSetCurrent(context(device)) == 0
    assert cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(num_bytes)) == 0
    alias = (ctypes.c_ubyte * num_bytes).from_address(cuda.emu_alias(at.value))
    array = np.frombuffer(alias, np.uint8)
    weakref.finalize(alias, _free, at.value)
    return Placed(at.value, array, MemoryKind.CUDA, alias)


def _free(at: int) -> None:
    library().cuCtxSetCurrent(context(0))
    library().cuMemFree_v2(at)


GPU = f"tests.cuda_emulated.{__name__.rpartition('.')[2]}:{gpu.__name__}"
