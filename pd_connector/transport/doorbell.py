"""A descriptor that polls readable from ``ring`` until ``clear``; any thread may ring."""

from __future__ import annotations

import os
import socket


class Doorbell:
    """Rings coalesce: the waiter learns that something happened, never how often, so nothing can overflow."""

    def __init__(self) -> None:
        self._pair: tuple[socket.socket, socket.socket] | None = None
        if hasattr(os, "eventfd"):
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
            self._fd = self._pair[0].fileno()
        self._closed = False

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        if self._closed:
            return
        try:
            if self._pair is None:
                os.eventfd_write(self._fd, 1)
            else:
                self._pair[1].send(b"\0")
        except BlockingIOError:
            pass  # as loud as it gets already

    def clear(self) -> None:
        try:
            if self._pair is None:
                os.eventfd_read(self._fd)
            else:
                while self._pair[0].recv(4096):
                    pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pair is None:
            os.close(self._fd)
        else:
            for end in self._pair:
                end.close()
