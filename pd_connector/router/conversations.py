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
    """``ticket`` as Ticket.to_bytes: it is looked at when it is used."""

    ticket: bytes
    until: float


class Conversations:
    """At most ``most`` tickets, of ``most_bytes`` together, and as many turns whose instance has not told yet. Times
    are monotonic seconds."""

    def __init__(self, most: int, most_bytes: int = 256 << 20) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._bytes = 0
        self._awaited: OrderedDict[bytes, Key] = OrderedDict()
        self._ending: dict[Key, tuple[bytes, float]] = {}
        """Of turns that have ended: by which id, and how long, their instance may take to tell."""

    def __len__(self) -> int:
        """What is kept and awaited."""
        return len(self._kept) + len(self._awaited)

    def begin(self, of: bytes, key: Key) -> None:
        """An instance is asked to keep a turn, and will tell under the id ``of``."""
        self._awaited[of] = key
        while len(self._awaited) > self._most:
            self.forget(next(iter(self._awaited)))

    def end(self, of: bytes, until: float) -> None:
        """The turn has ended; when the instance has not told by ``until``, it kept nothing."""
        if (key := self._awaited.get(of)) is not None:
            self._ending[key] = of, until

    def forget(self, of: bytes) -> Key | None:
        """The turn has failed, or its instance has told. Whose it was, if it was awaited."""
        key = self._awaited.pop(of, None)
        if key is not None and self._ending.get(key, (b"",))[0] == of:
            del self._ending[key]
        return key

    def is_awaited(self, keys: Sequence[Key], now: float) -> bool:
        """Whether the ticket of one of these may come any moment."""
        return any(key in self._ending and now < self._ending[key][1] for key in keys)

    def told(self, of: bytes, kept: Kept | None) -> list[Kept]:
        """An instance said what it kept. Returns the tickets that nobody will use. One that nobody asked is ignored."""
        key = self.forget(of)
        if key is None or kept is None:
            return []
        gone = [self._pop(key)] if key in self._kept else []
        self._kept[key] = kept
        self._bytes += len(kept.ticket)
        while len(self._kept) > self._most or self._bytes > self._most_bytes:
            gone.append(self._pop(next(iter(self._kept))))
        return gone

    def take(self, keys: Sequence[Key], now: float) -> bytes | None:
        """The ticket of the first of these that there is; it is used only once."""
        for key in keys:
            if key in self._kept and (kept := self._pop(key)).until > now:
                return kept.ticket
        return None

    def _pop(self, key: Key) -> Kept:
        kept = self._kept.pop(key)
        self._bytes -= len(kept.ticket)
        return kept
