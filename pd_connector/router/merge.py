"""Several choices, each answered by its own hand-over, put back into the one answer that the client asked for. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from pd_connector.router.sse import DONE, data_of, encode, error_of


def merge_plain(answers: list[bytes], n: int) -> bytes:
    """One response of the given ones, in the order of their index; ``n`` choices belong to each prompt."""
    documents = [orjson.loads(answer) for answer in answers]
    choices = [choice | {"index": k} for k, document in enumerate(documents) for choice in document["choices"][:1]]
    merged: dict[str, Any] = documents[0] | {"choices": choices}
    if usage := sum_usage({k: document.get("usage") for k, document in enumerate(documents)}, n):
        merged["usage"] = usage
    if "kv_transfer_params" in merged:
        merged["kv_transfer_params"] = None
    return orjson.dumps(merged)


def sum_usage(usages: dict[int, Any], n: int) -> dict[str, Any]:
    """Add up usage by choice index. The n choices of a prompt share it, so it counts once, as in vLLM and OpenAI."""
    total: dict[str, Any] = {}
    for k, usage in usages.items():
        if isinstance(usage, dict):
            _add(total, usage if k % n == 0 else {key: v for key, v in usage.items() if key.startswith("completion")})
    if total:
        total["total_tokens"] = total.get("prompt_tokens", 0) + total.get("completion_tokens", 0)
    return total


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        elif isinstance(value, (int, float)):
            total[key] = total.get(key, 0) + value


class StreamMerge:
    """Rewrites the events of several streams into those of one."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._identity: dict[str, Any] = {}
        self._usages: dict[int, Any] = {}
        self._usage_event: dict[str, Any] = {}
        self._done: set[int] = set()

    def rewrite(self, k: int, event: bytes) -> bytes | None:
        """The event as the client gets it for choice ``k``; None for one that the merged stream has once, at its end.

        Raises ValueError with the upstream's words for an error event or one that cannot be understood.
        """
        data = data_of(event)
        if data is None:
            return None
        if data == b"[DONE]":
            self._done.add(k)
            return None
        document = orjson.loads(data)
        if (error := error_of(document)) is not None:
            raise ValueError(str(error.get("message")))
        if not isinstance(document, dict) or not isinstance(document.get("choices"), list):
            raise ValueError("an event without choices")
        if not self._identity:
            self._identity = {key: document[key] for key in ("id", "created") if key in document}
        document |= self._identity
        if not document["choices"] and document.get("usage"):
            self._usages[k] = document["usage"]
            self._usage_event = self._usage_event or document
            return None
        for choice in document["choices"]:
            if not isinstance(choice, dict):
                raise ValueError("an event with a choice that is none")
            choice["index"] = k
        return encode(document)

    def is_done(self, k: int) -> bool:
        return k in self._done

    def ending(self) -> bytes:
        """What follows the last choice: the summed usage if the streams reported any, then the end mark."""
        if not self._usages:
            return DONE
        return encode(self._usage_event | {"usage": sum_usage(self._usages, self._n)}) + DONE
