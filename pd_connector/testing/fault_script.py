"""Which faults strike where: rules that a test changes while transports run, and the record of what happened.

Rules stand in a ``FaultScript``, or in a JSON file that another process may rewrite at any time (``write_script``
replaces it in one step)::

    {"rules": [{"on": "post_read", "nth": 1, "action": "hold", "at": "middle"}]}

What a rule holds stays held until the rule is gone from the script. Everything that happens is recorded, as JSON lines
in ``<script>.log`` too, so a test waits for an event and never sleeps: see ``FaultScript.wait`` and ``wait_for_event``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from pd_connector.errors import ConfigError
from pd_connector.transport.base import Status

log = logging.getLogger(__name__)

TICK_S = 0.01
KEPT_EVENTS = 10_000

Operation = Literal["post_read", "connect", "fence"]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``nth`` counts the operations seen since the rule stands in the script (0: every one, 1: the first).

    ``at`` is where it strikes: before the operation reaches the inner transport, in the middle (half of a read's bytes
    are written) or after it (bytes written, completion not yet shown). ``hold`` parks the operation until the rule is
    removed, ``delay`` for ``seconds``, ``drop`` until cancel, fence or disconnect ends it. ``fail`` ends it with
    ``status``, ``kill`` sends SIGKILL to ``pid`` (0: this process), ``corrupt`` flips the first byte the read wrote and
    ``duplicate`` shows the completion twice; these two always strike after. ``id`` tells equal rules apart.
    """

    action: Literal["hold", "delay", "drop", "duplicate", "corrupt", "kill", "fail"]
    on: Operation = "post_read"
    nth: int = 0
    at: Literal["before", "middle", "after"] = "before"
    seconds: float = 0.0
    pid: int = 0
    status: Status = Status.ERROR
    id: str = ""

    @property
    def strikes(self) -> str:
        return "after" if self.action in ("corrupt", "duplicate") else self.at


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    rules: tuple[Rule, ...] = ()


class FaultScript:
    """The rules in force and the record of what happened; one script may serve several transports of a process."""

    def __init__(self, rules: Iterable[Rule] = (), path: str | os.PathLike[str] | None = None) -> None:
        """With ``path`` the rules are the file's (none while it does not exist). Raises ConfigError if unreadable."""
        self._changed = threading.Condition()
        self._rules = tuple(rules)
        self._seen: Counter[Rule] = Counter()
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._path = None if path is None else Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._complained = False
        if self._path is not None:
            self._read(self._path)

    @property
    def rules(self) -> tuple[Rule, ...]:
        with self._changed:
            return self._rules

    def set(self, *rules: Rule) -> None:
        """Replace all rules; whatever a removed one held goes on."""
        with self._changed:
            self._rules = rules
            self._seen = Counter({rule: count for rule, count in self._seen.items() if rule in rules})

    def match(self, operation: Operation) -> Rule | None:
        """The first rule that strikes this operation; counts it for all."""
        self.refresh()
        with self._changed:
            mine = [rule for rule in self._rules if rule.on == operation]
            self._seen.update(mine)
            return next((rule for rule in mine if rule.nth in (0, self._seen[rule])), None)

    def refresh(self) -> None:
        """Read the file again if it changed; one that cannot be read leaves the old rules standing."""
        if self._path is None:
            return
        try:
            self._read(self._path)
        except ConfigError as error:
            if not self._complained:
                log.warning("%s", error)
            self._complained = True

    def record(self, event: str, **facts: Any) -> None:
        entry = {"event": event, "pid": os.getpid(), **facts}
        with self._changed:
            self._events.append(entry)
            if self._path is not None:
                with open(f"{self._path}.log", "ab") as file:
                    file.write(msgspec.json.encode(entry) + b"\n")
            self._changed.notify_all()

    def events(self, event: str) -> list[dict[str, Any]]:
        with self._changed:
            return [entry for entry in self._events if entry["event"] == event]

    def wait(self, event: str, timeout: float, count: int = 1) -> dict[str, Any]:
        """The ``count``-th record of an event; raises TimeoutError. Records of other processes are not seen here."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.events(event)) >= count, timeout):
                raise TimeoutError(
                    f"no {event!r} (number {count}) within {timeout} s; seen: {list(self._events)[-20:]}"
                )
            return self.events(event)[count - 1]

    def _read(self, path: Path) -> None:
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return
            document = msgspec.json.decode(path.read_bytes(), type=_Document)
        except FileNotFoundError:
            stamp, document = None, _Document()
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"fault script {path}: {error}") from error
        if stamp != self._stamp or stamp is None:
            self.set(*document.rules)
        self._stamp, self._complained = stamp, False


def write_script(path: str | os.PathLike[str], *rules: Rule) -> None:
    """Replace a script file in one step, so that no reader sees half of it."""
    draft = Path(f"{path}.{os.getpid()}.{threading.get_ident()}.new")
    draft.write_bytes(msgspec.json.encode(_Document(rules)))
    draft.replace(path)


def wait_for_event(path: str | os.PathLike[str], event: str, timeout: float, count: int = 1) -> dict[str, Any]:
    """The ``count``-th record of an event in ``<path>.log``, from whichever process; raises TimeoutError."""
    end = time.monotonic() + timeout
    while True:
        found = [entry for entry in read_events(path) if entry["event"] == event]
        if len(found) >= count:
            return found[count - 1]
        if time.monotonic() > end:
            raise TimeoutError(f"no {event!r} (number {count}) in {path}.log within {timeout} s")
        time.sleep(TICK_S)


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole lines of ``<path>.log``."""
    try:
        lines = Path(f"{path}.log").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [msgspec.json.decode(line) for line in lines]
