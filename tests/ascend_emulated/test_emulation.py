"""libascendcl.so emulated: what is tested with it is only as good as its rules are."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from .build import OUTPUT, build
from .libraries import (
    BY_ADDRESS,
    D2D,
    D2H,
    DEVICE,
    H2D,
    HOST,
    UNREGISTERED,
    BatchAttributes,
    Board,
    Location,
    PointerAttributes,
    made,
)
from .processes import free_port, in_thread, run_python

MIB = 1 << 20
RT_PARAM, NO_CONTEXT, STREAM_CONTEXT = 107000, 107002, 107003
SYNC_TIMEOUT, NOT_SUPPORTED, INTERNAL = 107020, 207000, 507899


def test_a_thread_without_a_context_is_refused_until_it_has_one(board: Board) -> None:
    context = made(board.acl.aclrtGetCurrentContext)
    pointer = ctypes.c_void_p()

    def without() -> list[int]:
        call = board.acl.aclrtMalloc
        before = call(ctypes.byref(pointer), MIB, 0)
        entered = board.acl.aclrtSetCurrentContext(context)
        after = call(ctypes.byref(pointer), MIB, 0)
        return [before, entered, after, board.acl.aclrtFree(pointer)]

    assert in_thread(without) == [NO_CONTEXT, 0, 0, 0]
    assert board.acl.aclrtSetCurrentContext(pointer) == RT_PARAM


def test_devices_are_counted_and_renumbered() -> None:
    code = (
        "n = c_uint32(); acl.aclrtGetDeviceCount(byref(n)); print(n.value, acl.emu_physical(0), acl.aclrtSetDevice(2))"
    )
    assert run_python(code).stdout.split() == ["2", "0", "107000"]
    seen = run_python(code, ASCEND_EMU_DEVICES="8", ASCEND_RT_VISIBLE_DEVICES="5,1,7")
    assert seen.stdout.split() == ["3", "5", "0"]


def test_a_cpu_that_touches_device_memory_crashes() -> None:
    code = "acl.aclrtSetDevice(0); p = c_void_p(); acl.aclrtMalloc(byref(p), c_size_t(100), 0); "
    touched = run_python(code + "print(p.value % (2 << 20), flush=True); string_at(p.value, 1)")
    assert touched.stdout == "0\n"
    assert touched.returncode == -signal.SIGSEGV


def test_copies_move_bytes_and_keep_to_their_allocations(board: Board) -> None:
    device, host = board.malloc(8192), board.malloc_host(8192)
    pageable = ctypes.create_string_buffer(os.urandom(4096), 4096)
    assert board.acl.aclrtMemcpy(device, 8192, pageable, 4096, H2D) == 0
    assert board.acl.aclrtMemcpy(device + 4096, 4096, device, 4096, D2D) == 0
    assert board.acl.aclrtMemcpy(host, 8192, device + 4096, 4096, BY_ADDRESS) == 0
    assert board.peek(host, 4096) == pageable.raw
    assert board.acl.aclrtMemcpy(device + 4097, 8192, host, 4096, H2D) == RT_PARAM
    assert b"leaves its allocation" in board.acl.aclGetRecentErrMsg()
    assert board.acl.aclrtMemcpy(device, 10, host, 11, H2D) == RT_PARAM
    assert board.acl.aclrtMemcpy(device, 8192, host, 10, D2H) == RT_PARAM
    assert board.acl.aclrtFree(device + 4096) == RT_PARAM
    assert board.acl.aclrtFree(device) == board.acl.aclrtFreeHost(host) == 0
    assert board.acl.aclrtFree(device) == RT_PARAM


def test_asynchronous_copies_take_pinned_memory_only(board: Board) -> None:
    device, stream = board.malloc(4096), board.stream()
    pageable = ctypes.create_string_buffer(b"x" * 4096, 4096)
    copy = (device, 4096, pageable, 4096, H2D, stream)
    assert board.acl.aclrtMemcpyAsync(*copy) == RT_PARAM
    view = made(board.acl.aclrtHostRegister, pageable, 4096, 0)
    assert view != ctypes.addressof(pageable)
    assert board.acl.aclrtMemcpyAsync(*copy) == 0
    assert board.acl.aclrtSynchronizeStream(stream) == 0
    assert board.peek(device, 4096) == pageable.raw
    assert board.acl.aclrtHostUnregister(pageable) == 0
    assert board.acl.aclrtMemcpyAsync(*copy) == RT_PARAM
    assert board.acl.aclrtDestroyStream(stream) == board.acl.aclrtFree(device) == 0


def test_streams_are_asynchronous_and_in_order(board: Board) -> None:
    device, host, stream, event = board.malloc(8), board.malloc_host(16), board.stream(), board.event()
    status = ctypes.c_int(7)
    board.faults("stream:1=~150")
    board.poke(host, b"firstone")
    began = time.monotonic()
    assert board.acl.aclrtMemcpyAsync(device, 8, host, 8, H2D, stream) == 0
    assert board.acl.aclrtMemcpyAsync(host + 8, 8, device, 8, D2H, stream) == 0
    assert board.acl.aclrtRecordEvent(event, stream) == 0
    assert board.acl.aclrtQueryEventStatus(event, ctypes.byref(status)) == status.value == 0
    assert board.acl.aclrtSynchronizeStreamWithTimeout(stream, 10) == SYNC_TIMEOUT
    board.poke(host, b"laterone")
    assert time.monotonic() - began < 0.15
    assert board.acl.aclrtSynchronizeEvent(event) == 0
    assert board.acl.aclrtQueryEventStatus(event, ctypes.byref(status)) == 0
    assert status.value == 1
    assert board.peek(host + 8, 8) == b"laterone"
    assert board.acl.aclrtDestroyEvent(event) == board.acl.aclrtDestroyStream(stream) == 0


def test_a_failed_copy_is_told_by_the_synchronisation(board: Board) -> None:
    device, host, stream = board.malloc(8), board.malloc_host(8), board.stream()
    board.faults("stream:1=507899;aclrtMemcpyAsync:2=207001")
    copy = (device, 8, host, 8, H2D, stream)
    assert board.acl.aclrtMemcpyAsync(*copy) == 0
    assert board.acl.aclrtSynchronizeStream(stream) == INTERNAL
    assert board.acl.aclrtMemcpyAsync(*copy) == 207001
    assert board.acl.aclrtSynchronizeStream(stream) == 0
    assert board.acl.emu_calls(b"aclrtMemcpyAsync") == 2
    board.faults("stream:1=~50")
    assert board.acl.aclrtMemcpyAsync(*copy) == board.acl.aclrtFree(device) == 0
    assert board.acl.aclrtSynchronizeStream(stream) == INTERNAL
    assert board.acl.emu_faults(b"aclrtMemcpy:x=1") == -1


def test_a_stream_belongs_to_its_device(board: Board) -> None:
    stream = board.stream()

    def elsewhere() -> int:
        board.acl.aclrtSetDevice(1)
        return int(board.acl.aclrtSynchronizeStream(stream))

    assert in_thread(elsewhere) == STREAM_CONTEXT
    assert board.acl.aclrtDestroyStream(stream) == 0
    assert board.acl.aclrtSynchronizeStream(stream) == RT_PARAM


def test_a_batch_goes_one_way_and_names_the_copy_that_failed(board: Board) -> None:
    device, host, stream = board.malloc(64), board.malloc_host(64), board.stream()
    failed = ctypes.c_size_t(5)
    board.poke(host, bytes(range(64)))

    def batch(ways: list[tuple[int, int]], sizes: list[int]) -> int:
        count = len(sizes)
        attributes = (BatchAttributes * len(ways))(
            *(BatchAttributes(Location(0, to), Location(0, from_)) for to, from_ in ways)
        )
        to = (ctypes.c_void_p * count)(*(device + 8 * i for i in range(count)))
        from_ = (ctypes.c_void_p * count)(*(host + 8 * i for i in range(count)))
        lengths = (ctypes.c_size_t * count)(*sizes)
        starts = (ctypes.c_size_t * len(ways))(*range(len(ways)))
        call = board.acl.aclrtMemcpyBatchAsync
        place = ctypes.byref(failed)
        return int(call(to, lengths, from_, lengths, count, attributes, starts, len(ways), place, stream))

    assert batch([(DEVICE, HOST)], [8, 8, 8]) == board.acl.aclrtSynchronizeStream(stream) == 0
    assert board.peek(device, 24) == bytes(range(24))
    assert batch([(DEVICE, DEVICE)], [8]) == NOT_SUPPORTED
    assert batch([(DEVICE, HOST), (HOST, DEVICE)], [8, 8]) == NOT_SUPPORTED
    assert failed.value == ctypes.c_size_t(-1).value
    assert batch([(DEVICE, HOST)], [8, 60]) == RT_PARAM
    assert failed.value == 1


def test_pointers_tell_what_they_are(board: Board) -> None:
    device, host, attributes = board.malloc(64), board.malloc_host(64), PointerAttributes()
    other = ctypes.create_string_buffer(64)

    def kind(pointer: Any) -> int:
        assert board.acl.aclrtPointerGetAttributes(pointer, ctypes.byref(attributes)) == 0
        return int(attributes.location.type)

    assert [kind(device + 63), kind(host), kind(other)] == [DEVICE, HOST, UNREGISTERED]
    assert board.acl.emu_adopt(other, 64) == 0
    assert kind(other) == DEVICE
    assert board.acl.emu_alias(other) == ctypes.addressof(other)
    assert board.acl.emu_disown(other) == 0
    assert kind(other) == UNREGISTERED
    assert board.acl.emu_alias(host) is None


def test_faults_come_from_the_environment() -> None:
    code = "print([acl.aclInit(None) for _ in range(3)])"
    assert run_python(code, ASCEND_EMU_FAULTS="aclInit:1=5").stdout == "[5, 0, 100002]\n"
    assert run_python(code, ASCEND_EMU_FAULTS="aclInit").returncode == -signal.SIGABRT


def test_a_forked_child_has_no_context_and_ends() -> None:
    code = """
import os, sys
hixl = CDLL("libemu_hixl_c.so")
hixl.emu_hixl_new.restype = c_void_p
acl.aclrtSetDevice(0)
stream, device, host, engine = c_void_p(), c_void_p(), c_void_p(), c_void_p(hixl.emu_hixl_new())
acl.aclrtCreateStream(byref(stream)), acl.aclrtMalloc(byref(device), c_size_t(8), 0)
acl.aclrtMallocHost(byref(host), c_size_t(8))
started = hixl.emu_hixl_initialize(engine, b"127.0.0.1:PORT")
acl.emu_faults(b"stream:*=~200")
acl.aclrtMemcpyAsync(device, c_size_t(8), host, c_size_t(8), 1, stream)
child = os.fork()
if child:
    os.waitpid(child, 0)
print(started, acl.aclrtSynchronizeStream(stream), acl.aclrtSetDevice(0), acl.aclrtDestroyStream(stream), flush=True)
hixl.emu_hixl_delete(engine)
""".replace("PORT", str(free_port()))
    done = run_python(code)
    assert done.stdout.splitlines() == [f"0 {NO_CONTEXT} 0 {RT_PARAM}", "0 0 0 0"], done.stderr
    assert done.returncode == 0


def test_nothing_else_is_built_than_what_is_newer() -> None:
    before = (OUTPUT / "libhccl.so").stat().st_mtime_ns
    build()
    assert (OUTPUT / "libhccl.so").stat().st_mtime_ns == before
