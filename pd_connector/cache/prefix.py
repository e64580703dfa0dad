"""Canonical prefix keys: what identifies the KV of a run of tokens, on every host and in every process alike.

A key is a chain of BLAKE2b digests. Its root covers everything but the tokens that KV depends on; nothing of it depends
on PYTHONHASHSEED, object ids or an engine's own hash settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

KEY_BYTES = 16
_FORMAT = b"pd_connector prefix key 1"


def root_key(*, model: str, salt: str = "", lora: str = "", media: Sequence[tuple[int, str]] = ()) -> bytes:
    """Start of a chain: model identity, the tenant's cache salt, the LoRA adapter's name, and (token position, content
    hash) of every image, audio or video item in the tokens that follow."""
    body = msgspec.msgpack.encode([model, salt, lora, [list(item) for item in media]])
    return _digest(_FORMAT, body)


def extend_key(key: bytes, tokens: Sequence[int] | npt.NDArray[np.uint32]) -> bytes:
    """The key of the tokens so far followed by ``tokens`` (ids below 2**32). How a run is cut into calls matters: both
    sides must cut alike."""
    return _digest(key, np.asarray(tokens, dtype="<u4").tobytes())


def prefix_keys(key: bytes, tokens: Sequence[int] | npt.NDArray[np.uint32], counts: Sequence[int]) -> list[bytes]:
    """``extend_key(key, tokens[:count])`` of every count, which ascend, at the price of the longest one."""
    data, out, done = np.asarray(tokens, dtype="<u4").tobytes(), [], 0
    digest = hashlib.blake2b(digest_size=KEY_BYTES, key=key)
    for count in counts:
        digest.update(data[4 * done : 4 * count])
        done = count
        out.append(digest.digest())
    return out


def _digest(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, key=key).digest()
