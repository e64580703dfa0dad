"""The book of open tags: the place where "exactly one completion per tag" is kept."""

from __future__ import annotations

import threading
from collections import deque

from pd_connector.errors import LocalProtocolError
from pd_connector.transport.base import Completion, Status
from pd_connector.transport.doorbell import Doorbell

MAX_OPEN_TAGS = 65536


class TagBook:
    """A tag is open from ``open`` until ``take`` hands its completion out, so the completions are bounded too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[int] = set()
        self._unfinished: set[int] = set()
        self._done: deque[Completion] = deque()
        self._closed = False
        self.doorbell = Doorbell()

    def open(self, tag: int) -> None:
        """Raises LocalProtocolError when the tag is in use or MAX_OPEN_TAGS tags are."""
        with self._lock:
            if tag in self._open:
                raise LocalProtocolError(f"tag {tag} is still in use: every read needs a tag of its own")
            if len(self._open) >= MAX_OPEN_TAGS:
                raise LocalProtocolError(f"{MAX_OPEN_TAGS} reads are open already: wait for completions first")
            self._open.add(tag)
            self._unfinished.add(tag)

    def finish(self, tag: int, status: Status, detail: str = "") -> bool:
        """False, and nothing else, when the tag has been answered already."""
        with self._lock:
            if tag not in self._unfinished or self._closed:
                return False
            self._unfinished.discard(tag)
            self._done.append(Completion(tag, status, detail))
            self.doorbell.ring()
            return True

    def withdraw(self, tag: int) -> None:
        """Undo ``open``: the operation was refused, so there is nothing to complete."""
        with self._lock:
            self._open.discard(tag)
            self._unfinished.discard(tag)

    def finish_all(self, status: Status, detail: str) -> None:
        with self._lock:
            tags = sorted(self._unfinished)
        for tag in tags:
            self.finish(tag, status, detail)

    def take(self, limit: int, *, rearm: bool = False) -> list[Completion]:
        """``rearm``: leave the doorbell ringing because there is more to do than completions."""
        with self._lock:
            if self._closed:
                return []
            taken = [self._done.popleft() for _ in range(min(max(limit, 0), len(self._done)))]
            self._open.difference_update(completion.tag for completion in taken)
            if self._done or rearm:
                self.doorbell.ring()
            else:
                self.doorbell.clear()
            return taken

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._open.clear()
            self._unfinished.clear()
            self._done.clear()
            self.doorbell.close()
