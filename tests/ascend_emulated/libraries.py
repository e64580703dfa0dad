"""The emulated libraries for ctypes: what tests of the emulation, and of what is built on it, call them with."""

from __future__ import annotations

import ctypes
from ctypes import CDLL, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

from .build import build

H2H, H2D, D2H, D2D, BY_ADDRESS = range(5)
HOST, DEVICE, UNREGISTERED = range(3)


class Location(ctypes.Structure):
    _fields_ = [("id", c_uint32), ("type", c_int)]


class PointerAttributes(ctypes.Structure):
    _fields_ = [("location", Location), ("page_size", c_uint32), ("reserved", c_uint32 * 4)]


class BatchAttributes(ctypes.Structure):
    _fields_ = [("to", Location), ("from_", Location), ("reserved", ctypes.c_uint8 * 16)]


class RootInfo(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 4108)]


class SendRecvItem(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("buffer", c_void_p),
        ("count", c_uint64),
        ("data_type", c_int),
        ("peer", c_uint32),
    ]


P, S = c_void_p, c_size_t
SIGNATURES: dict[str, dict[str, list[Any]]] = {
    "ascendcl": {
        "aclInit": [c_char_p],
        "aclrtGetDeviceCount": [P],
        "aclrtSetDevice": [c_int32],
        "aclrtGetDevice": [P],
        "aclrtResetDevice": [c_int32],
        "aclrtGetCurrentContext": [P],
        "aclrtSetCurrentContext": [P],
        "aclrtMalloc": [P, S, c_int],
        "aclrtFree": [P],
        "aclrtMallocHost": [P, S],
        "aclrtFreeHost": [P],
        "aclrtHostRegister": [P, c_uint64, c_int, P],
        "aclrtHostUnregister": [P],
        "aclrtMemcpy": [P, S, P, S, c_int],
        "aclrtMemcpyAsync": [P, S, P, S, c_int, P],
        "aclrtMemcpyBatchAsync": [P, P, P, P, S, P, P, S, P, P],
        "aclrtCreateStream": [P],
        "aclrtDestroyStream": [P],
        "aclrtSynchronizeStream": [P],
        "aclrtSynchronizeStreamWithTimeout": [P, c_int32],
        "aclrtCreateEvent": [P],
        "aclrtDestroyEvent": [P],
        "aclrtRecordEvent": [P, P],
        "aclrtQueryEventStatus": [P, P],
        "aclrtSynchronizeEvent": [P],
        "aclrtPointerGetAttributes": [P, P],
        "emu_faults": [c_char_p],
        "emu_adopt": [P, S],
        "emu_disown": [P],
        "emu_physical": [c_int],
    },
    "emu_hixl_c": {
        "emu_hixl_initialize": [P, c_char_p],
        "emu_hixl_register": [P, P, S, c_int, P],
        "emu_hixl_deregister": [P, P],
        "emu_hixl_connect": [P, c_char_p, c_int32],
        "emu_hixl_disconnect": [P, c_char_p, c_int32],
        "emu_hixl_transfer": [P, c_char_p, c_int, P, S, c_int32],
        "emu_hixl_start": [P, c_char_p, c_int, P, P],
        "emu_hixl_status": [P, P, P],
    },
    "hccl": {
        "HcclGetRootInfo": [P],
        "HcclCommInitRootInfo": [c_uint32, P, c_uint32, P],
        "HcclSend": [P, c_uint64, c_int, c_uint32, P, P],
        "HcclRecv": [P, c_uint64, c_int, c_uint32, P, P],
        "HcclBatchSendRecv": [P, c_uint32, P, P],
        "HcclCommDestroy": [P],
        "HcclGetCommAsyncError": [P, P],
    },
}


def load(name: str) -> CDLL:
    library = CDLL(str(build() / f"lib{name}.so"))
    for function, arguments in SIGNATURES[name].items():
        getattr(library, function).argtypes = arguments
    if name == "ascendcl":
        library.emu_calls.argtypes, library.emu_calls.restype = [c_char_p], c_uint64
        library.emu_alias.argtypes, library.emu_alias.restype = [c_void_p], c_void_p
        library.aclGetRecentErrMsg.restype = c_char_p
    if name == "emu_hixl_c":
        library.emu_hixl_new.restype = c_void_p
        library.emu_hixl_delete.argtypes = library.emu_hixl_finalize.argtypes = [c_void_p]
        library.emu_hixl_delete.restype = library.emu_hixl_finalize.restype = None
    return library


def made(function: Any, *arguments: Any) -> int:
    """What a function makes that stores a pointer and returns 0; where the pointer is to be stored comes last."""
    pointer = c_void_p()
    status = function(*arguments, ctypes.byref(pointer))
    assert status == 0, f"{function.__name__}: {status}"
    return pointer.value or 0


class Board:
    """A device with the calling thread's context on it."""

    def __init__(self, device: int = 0) -> None:
        self.acl = load("ascendcl")
        assert self.acl.aclrtSetDevice(device) == 0

    def malloc(self, size: int) -> int:
        return self._allocated(self.acl.aclrtMalloc, size, 0)

    def malloc_host(self, size: int) -> int:
        return self._allocated(self.acl.aclrtMallocHost, size)

    def stream(self) -> int:
        return made(self.acl.aclrtCreateStream)

    def event(self) -> int:
        return made(self.acl.aclrtCreateEvent)

    def poke(self, pointer: int, data: bytes) -> None:
        ctypes.memmove(self.acl.emu_alias(pointer) or pointer, data, len(data))

    def peek(self, pointer: int, size: int) -> bytes:
        return ctypes.string_at(self.acl.emu_alias(pointer) or pointer, size)

    def faults(self, spec: str) -> None:
        assert self.acl.emu_faults(spec.encode()) == 0

    @staticmethod
    def _allocated(function: Any, *arguments: Any) -> int:
        pointer = c_void_p()
        assert function(ctypes.byref(pointer), *arguments) == 0
        assert pointer.value
        return pointer.value


class Engine:
    """An engine of the class, called by way of C."""

    def __init__(self, name: str) -> None:
        self.library = load("emu_hixl_c")
        self.self = self.library.emu_hixl_new()
        self.name = name

    def initialize(self) -> int:
        return int(self.library.emu_hixl_initialize(self.self, self.name.encode()))

    def register(self, start: int, size: int, is_host: bool = False) -> tuple[int, int]:
        handle = c_void_p()
        status = self.library.emu_hixl_register(self.self, start, size, is_host, ctypes.byref(handle))
        return status, handle.value or 0

    def deregister(self, handle: int) -> int:
        return int(self.library.emu_hixl_deregister(self.self, handle))

    def connect(self, remote: str, timeout_ms: int = 2000) -> int:
        return int(self.library.emu_hixl_connect(self.self, remote.encode(), timeout_ms))

    def disconnect(self, remote: str, timeout_ms: int = 2000) -> int:
        return int(self.library.emu_hixl_disconnect(self.self, remote.encode(), timeout_ms))

    def transfer(self, remote: str, is_write: bool, *ops: tuple[int, int, int], timeout_ms: int = 2000) -> int:
        flat = (c_uint64 * (3 * len(ops)))(*(number for op in ops for number in op))
        return int(self.library.emu_hixl_transfer(self.self, remote.encode(), is_write, flat, len(ops), timeout_ms))

    def start(self, remote: str, is_write: bool, op: tuple[int, int, int]) -> int:
        return made(self.library.emu_hixl_start, self.self, remote.encode(), is_write, (c_uint64 * 3)(*op))

    def status(self, request: int) -> tuple[int, int]:
        status = c_int()
        return self.library.emu_hixl_status(self.self, request, ctypes.byref(status)), status.value

    def finalize(self) -> None:
        self.library.emu_hixl_finalize(self.self)

    def delete(self) -> None:
        self.library.emu_hixl_delete(self.self)
