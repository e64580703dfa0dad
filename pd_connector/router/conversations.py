"""Which decode instance keeps the KV of which conversation: the tickets that the next turns' prefills read. No I/O.

A conversation is known by the name that its client gives it, or, in chats, by its messages: the next turn repeats those
of this one and adds the answer and a new question. A wrong guess costs nothing but a look: a ticket says of which
tokens it is, and a prefill instance loads no others.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

Key = bytes


def keys_of(name: str | None, whose: str, body: Mapping[str, Any]) -> tuple[Key, ...]:
    """The turns that a request may be the next one of, longest first; the first key is that of the request itself. By
    the ``name`` of its conversation, or by its messages; none for a plain completion without a name. ``whose`` keeps
    clients apart."""
    root = _digest(b"", orjson.dumps([whose, str(body.get("model")), str(body.get("cache_salt"))]))
    if name is not None:
        return (_digest(root, b"name " + name.encode()),)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ()
    keys, key = [], root
    for number, message in enumerate(messages, 1):
        key = _digest(key, orjson.dumps(message, option=orjson.OPT_SORT_KEYS))
        following = messages[number] if number < len(messages) else {"role": "assistant"}
        if isinstance(following, dict) and following.get("role") == "assistant":
            keys.append(key)
    return tuple(keys[::-1])


def _digest(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=key).digest()


@dataclass(frozen=True, slots=True)
class Kept:
    """``ticket`` as kv_transfer_params."""

    ticket: dict[str, Any]
    until: float


@dataclass(slots=True)
class _Awaited:
    key: Key
    until: float | None = None
    """Of a turn that has ended: how long its instance may take to tell."""


class Conversations:
    """At most ``most`` tickets, and as many turns whose instance has not told yet. Times are monotonic seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._awaited: OrderedDict[bytes, _Awaited] = OrderedDict()

    def __len__(self) -> int:
        """What is kept and awaited."""
        return len(self._kept) + len(self._awaited)

    def begin(self, of: bytes, key: Key) -> None:
        """An instance is asked to keep a turn, and will tell under the id ``of``."""
        self._awaited[of] = _Awaited(key)
        while len(self._awaited) > self._most:
            self._awaited.popitem(last=False)

    def end(self, of: bytes, until: float) -> None:
        """The turn has ended; when the instance has not told by ``until``, it kept nothing."""
        if of in self._awaited:
            self._awaited[of].until = until

    def forget(self, of: bytes) -> None:
        """The turn has failed."""
        self._awaited.pop(of, None)

    def is_awaited(self, keys: Sequence[Key], now: float) -> bool:
        """Whether the ticket of one of these may come any moment."""
        return any(one.key in keys and one.until is not None and now < one.until for one in self._awaited.values())

    def told(self, of: bytes, kept: Kept | None) -> list[Kept]:
        """An instance said what it kept. Returns the tickets that nobody will use."""
        awaited = self._awaited.pop(of, None)
        if kept is None or awaited is None:
            return [] if kept is None else [kept]
        gone = [old] if (old := self._kept.pop(awaited.key, None)) is not None else []
        self._kept[awaited.key] = kept
        while len(self._kept) > self._most:
            gone.append(self._kept.popitem(last=False)[1])
        return gone

    def take(self, keys: Sequence[Key], now: float) -> Kept | None:
        """The ticket of the first of these that there is; it is used only once."""
        for key in keys:
            kept = self._kept.pop(key, None)
            if kept is not None and kept.until > now:
                return kept
        return None
