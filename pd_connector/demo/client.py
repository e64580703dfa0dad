"""One streamed completion, as a client sees it: tokens, how likely others were, the time to the first token."""

from __future__ import annotations

import http.client
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pd_connector.demo.instance import Instance, InstanceFailed
from pd_connector.demo.prompts import OUTPUT_TOKENS

_TOP = 5
"""Alternatives that vLLM lists per position: its default upper bound is 20, a tie needs two."""
_TOKEN = "token_id:"


@dataclass(frozen=True, slots=True)
class Answer:
    """``likeliest`` maps, per output position, token ids to log-probabilities; ``ttft_s`` is the client's own clock;
    ``stages_ms`` is the Server-Timing header."""

    tokens: tuple[int, ...]
    likeliest: tuple[Mapping[int, float], ...]
    ttft_s: float
    stages_ms: Mapping[str, float]

    def margin(self, position: int, other: int) -> float:
        """By how much the token chosen here beats ``other``; infinite when that is not among the likeliest."""
        listed = self.likeliest[position]
        return listed[self.tokens[position]] - listed.get(other, -math.inf)


def ask(server: Instance, prompt: Sequence[int], *, timeout: float, fresh: bool = False) -> Answer:
    """Greedy completion of token ids. ``fresh``: no prefix cache may help. Raises InstanceFailed for an error answer.

    ``timeout`` bounds every single wait for bytes, in seconds.
    """
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": list(prompt),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": _TOP,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if fresh:
        body["cache_salt"] = uuid.uuid4().hex
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        started = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            words = response.read(2000).decode(errors="replace")
            raise InstanceFailed(f"{server.name} answered {response.status} to {len(prompt)} tokens: {words}")
        return _collect(server, response, started)
    except (OSError, http.client.HTTPException) as error:
        raise InstanceFailed(f"{server.name} broke off the answer to {len(prompt)} tokens: {error!r}") from None
    finally:
        connection.close()


def _collect(server: Instance, response: http.client.HTTPResponse, started: float) -> Answer:
    tokens: list[int] = []
    likeliest: list[Mapping[int, float]] = []
    ttft = 0.0
    for event in _events(response):
        if "error" in event:
            raise InstanceFailed(f"{server.name} answered with an error: {event['error']}")
        for choice in event["choices"]:
            fresh = choice.get("token_ids") or ()
            if fresh and not tokens:
                ttft = time.monotonic() - started
            tokens.extend(fresh)
            for listed in (choice.get("logprobs") or {}).get("top_logprobs") or ():
                likeliest.append({int(name.removeprefix(_TOKEN)): value for name, value in listed.items()})
    if len(tokens) != OUTPUT_TOKENS or len(likeliest) != OUTPUT_TOKENS:
        raise InstanceFailed(
            f"{server.name} gave {len(tokens)} tokens and {len(likeliest)} log-probabilities, not {OUTPUT_TOKENS}"
        )
    return Answer(tuple(tokens), tuple(likeliest), ttft, _server_timing(response.getheader("server-timing", "")))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """vLLM's and the router's events have one data line each."""
    while line := response.readline():
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)


def _server_timing(header: str) -> dict[str, float]:
    stages = {}
    for entry in filter(None, header.split(",")):
        name, _, duration = entry.strip().partition(";dur=")
        stages[name] = float(duration)
    return stages
