"""A thread that does one thing after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from pd_connector.transport.threaded import set_affinity

Do = Callable[[], None]


class Worker:
    """A daemon, unlike an executor's threads: one that waits for a device which never answers must not keep its process
    from ending."""

    def __init__(self, name: str, cpus: tuple[int, ...] = ()) -> None:
        self._queue: SimpleQueue[tuple[Future[None], Do] | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._main, args=(name, cpus), name=name, daemon=True)
        self._thread.start()

    def submit(self, do: Do) -> Future[None]:
        """Cancelled at once when this is closed."""
        future: Future[None] = Future()
        self._queue.put((future, do))
        if self._closing:
            future.cancel()
        return future

    def close(self, wait: bool) -> None:
        """Cancel what has not begun. ``wait``: until the rest is done."""
        self._closing = True
        self._queue.put(None)
        if wait:
            self._thread.join()

    def _main(self, name: str, cpus: tuple[int, ...]) -> None:
        set_affinity(cpus, name)
        while (job := self._queue.get()) is not None:
            future, do = job
            if self._closing:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                do()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
