"""Server-sent events as OpenAI servers write them: where one event ends, what it carries."""

from __future__ import annotations

import re
from typing import Any

import orjson

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
DONE = b"data: [DONE]\n\n"


class EventSplitter:
    """Cuts a byte stream into whole events.

    ``feed`` raises ValueError when an event without an end grows beyond ``limit`` bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events, each with its blank line, that ``chunk`` completed."""
        buffer = self._buffer
        # An end may straddle the old and the new bytes by three; what lies before was searched already.
        position = max(0, len(buffer) - 3)
        buffer += chunk
        events = []
        start = 0
        while (end := _END.search(buffer, position)) is not None:
            events.append(bytes(buffer[start : end.end()]))
            start = position = end.end()
        del buffer[:start]
        if len(buffer) > self._limit:
            raise ValueError(f"an event is longer than {self._limit} bytes")
        return events

    def left(self) -> bytes:
        """The bytes after the last whole event."""
        return bytes(self._buffer)


def data_of(event: bytes) -> bytes | None:
    """The payload of an event, its ``data`` lines joined; None for a comment (a keep-alive)."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def error_of(document: Any) -> dict[str, Any] | None:
    """The ``error`` object of a decoded answer or event, if it carries one."""
    if not isinstance(document, dict) or not document.get("error"):
        return None
    error = document["error"]
    return error if isinstance(error, dict) else {"message": str(error)}


def encode(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def error_event(message: str, kind: str, code: int) -> bytes:
    return encode(error_body(message, kind, code))


def error_body(message: str, kind: str, code: int) -> dict[str, Any]:
    """The OpenAI shape of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
