"""An event loop in a thread, for engines that are not asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from pd_connector.errors import LocalProtocolError

T = TypeVar("T")


def spread_over_cpus(cpus: Sequence[int]) -> None:
    """Let the calling thread run on ``cpus``, or on all of the machine when empty. Engines pin themselves to one core,
    threads inherit that, and an I/O thread that shares the engine's core waits for it."""
    # Not permitted (cpuset) or not Linux: the inherited mask stays.
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, cpus or range(os.cpu_count() or 1))


class Portal:
    """Runs coroutines and functions on its own loop. Every wait has a deadline."""

    def __init__(self, name: str, cpus: Sequence[int] = ()) -> None:
        self._ready = threading.Event()
        self._cpus = tuple(cpus)
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        self._ready.wait(10)

    def _main(self) -> None:
        spread_over_cpus(self._cpus)
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Run a function on the loop some time soon; calls from one thread keep their order."""
        self._check()
        self._loop.call_soon_threadsafe(function, *args)

    def call(self, function: Callable[..., T], *args: Any, timeout: float = 10.0) -> T:
        """Run a function on the loop and wait for its result. Raises what it raises, TimeoutError when it is late."""
        self._check(waiting=True)

        async def run() -> T:
            return function(*args)

        return self.run(run(), timeout=timeout)

    def run(self, awaitable: Awaitable[T], *, timeout: float) -> T:
        self._check(waiting=True)

        async def bounded() -> T:
            return await asyncio.wait_for(awaitable, timeout)

        future: Future[T] = asyncio.run_coroutine_threadsafe(bounded(), self._loop)
        return future.result(timeout + 5.0)

    def close(self) -> None:
        if self._loop.is_closed() or os.getpid() != self._pid:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()

    def _check(self, *, waiting: bool = False) -> None:
        if os.getpid() != self._pid:
            raise LocalProtocolError("this portal was made before a fork: make a new one in the child")
        if self._loop.is_closed():
            raise LocalProtocolError("this portal is closed")
        if waiting and threading.current_thread() is self._thread:
            raise LocalProtocolError("a portal cannot wait for itself: call it from another thread")
