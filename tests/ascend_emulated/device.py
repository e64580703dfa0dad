"""Memory of an emulated NPU. Not run on hardware: the libraries are tests/ascend_emulated's own."""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache

import numpy as np

from pd_connector.memory import MemoryKind
from pd_connector.testing.arena import Placed

from .build import build


@cache
def library() -> ctypes.CDLL:
    """The emulated AscendCL, in this process and, by name, in those that it starts."""
    folder = str(build())
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if folder not in paths:
        os.environ["LD_LIBRARY_PATH"] = ":".join([folder, *filter(None, paths)])
    for name in ("libascendcl.so", "libmetadef.so", "libcann_hixl.so", "libhccl.so"):
        ctypes.CDLL(f"{folder}/{name}", mode=ctypes.RTLD_GLOBAL)
    acl = ctypes.CDLL(f"{folder}/libascendcl.so")
    acl.emu_alias.restype = ctypes.c_void_p
    acl.emu_alias.argtypes = [ctypes.c_void_p]
    acl.emu_calls.restype = ctypes.c_uint64
    acl.aclrtFree.argtypes = [ctypes.c_void_p]
    return acl


def npu(num_bytes: int) -> Placed:
    """Of device 0; the processor cannot touch its address, but sees the bytes through another mapping."""
    acl, at = library(), ctypes.c_void_p()
    assert acl.aclrtSetDevice(0) == 0
    assert acl.aclrtMalloc(ctypes.byref(at), ctypes.c_size_t(num_bytes), 0) == 0
    assert at.value is not None
    alias = (ctypes.c_ubyte * num_bytes).from_address(acl.emu_alias(at))
    array = np.frombuffer(alias, np.uint8)
    weakref.finalize(alias, acl.aclrtFree, at.value)
    return Placed(at.value, array, MemoryKind.NPU, alias)


def adopted(num_bytes: int) -> Placed:
    """Host memory that counts as device 0's from now on: had without a call that a test may let fail."""
    acl, array = library(), np.empty(num_bytes, np.uint8)
    address = array.ctypes.data
    assert acl.emu_adopt(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)) == 0
    weakref.finalize(array, acl.emu_disown, ctypes.c_void_p(address))
    return Placed(address, array, MemoryKind.NPU, array)


_HERE = f"tests.ascend_emulated.{__name__.rpartition('.')[2]}"
NPU, ADOPTED = f"{_HERE}:{npu.__name__}", f"{_HERE}:{adopted.__name__}"
