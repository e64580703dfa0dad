"""Arguments of the public API, checked before anything happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_connector.errors import LocalProtocolError
from pd_connector.plan import block_ids
from pd_connector.protocol.ticket import ADDRESS


def check_seconds(what: str, seconds: object) -> None:
    """Raises LocalProtocolError unless it is None or a time."""
    if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise LocalProtocolError(f"{what} of {seconds!r} seconds: it must be positive and finite")


def check_count(name: str, value: object) -> None:
    """Raises LocalProtocolError unless it is a whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise LocalProtocolError(f"{name} must be a whole number from 0 on, got {value!r}")


def check_list(name: str, value: Any) -> Any:
    """Raises LocalProtocolError unless it is a list of something."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise LocalProtocolError(f"{name} must be a list, got {value!r}")
    return value


def check_range(value: Any) -> tuple[int, int]:
    """(first, behind the last) as Python's integers. Raises LocalProtocolError."""
    bounds = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes) else []
    whole = len(bounds) == 2 and all(isinstance(b, int | np.integer) and not isinstance(b, bool) for b in bounds)
    if not whole or not 0 <= int(bounds[0]) <= int(bounds[1]) < 2**48:
        raise LocalProtocolError(
            f"a range of tokens is (first, behind the last), whole numbers from 0 on, got {value!r}"
        )
    return int(bounds[0]), int(bounds[1])


def check_address(address: str) -> None:
    """Raises LocalProtocolError unless an agent could answer there."""
    if not ADDRESS.fullmatch(address):
        raise LocalProtocolError(f"{address[:200]!r} is not tcp://HOST:PORT or tcp://HOST:PORT#KEY")


def check_bytes(name: str, value: object, length: int | None = None) -> None:
    """Raises LocalProtocolError unless it is bytes, and so many. Does not repeat them: they may be secret."""
    if not isinstance(value, bytes) or (length is not None and len(value) != length):
        kind = "bytes" if length is None else f"{length} bytes"
        raise LocalProtocolError(f"{name} must be {kind}, got a {type(value).__name__} of another kind or length")


def block_groups(blocks: Sequence[int] | Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.uint32], ...]:
    """Block ids per KV cache group, from a list of ids or a list of such lists. Raises LocalProtocolError."""
    if not isinstance(blocks, Sequence | np.ndarray):
        raise LocalProtocolError(f"blocks must be a list of ids or of such lists, got {type(blocks).__name__}")
    nested = len(blocks) > 0 and isinstance(blocks[0], Sequence | np.ndarray) and not isinstance(blocks[0], str)
    groups: Any = blocks if nested else [blocks]
    return tuple(block_ids(group, "given").astype(np.uint32) for group in groups)
