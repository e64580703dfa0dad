"""Answers that are waited for in threads, and clients that leave."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Sequence
from typing import Any

from serving import Answer, ask

from pd_connector.demo.instance import Instance

_HEADERS = {"content-type": "application/json"}


class Later:
    """An answer that is being waited for in a thread."""

    def __init__(self, server: Instance, prompt: Sequence[int], tokens: int, ticket: Any) -> None:
        self._answer: Answer | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(server, prompt, tokens, ticket))
        self._thread.start()

    def _run(self, *args: Any) -> None:
        try:
            self._answer = ask(*args)
        except BaseException as error:
            self._answer = error

    def result(self, seconds: float = 60) -> Answer:
        """Raises what the request raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"no answer within {seconds:g} s"
        if isinstance(self._answer, BaseException):
            raise self._answer
        assert self._answer is not None
        return self._answer


class Call:
    """A request whose client may leave at any time."""

    def __init__(self, server: Instance, request: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self._connection.request("POST", "/v1/completions", json.dumps(request), _HEADERS)

    def first_bytes(self) -> bytes:
        return self._connection.getresponse().read1(65536)

    def events(self) -> list[dict[str, Any]]:
        """All events of a streamed answer, without its end mark."""
        lines = self._connection.getresponse().read().decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def leave(self) -> None:
        assert self._connection.sock is not None
        self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()
