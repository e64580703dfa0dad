"""One tree of errors: every message names what failed, with whom, at which stage, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class PDError(Exception):
    """Base of every error that pd_connector raises on purpose."""


class ConfigError(PDError):
    """A configuration value cannot be used; the message names the key and the remedy."""


class LocalProtocolError(PDError):
    """The caller broke a rule of this library (wrong state, unknown block, closed agent)."""


class RemoteProtocolError(PDError):
    """A peer sent something that this protocol version does not allow."""


class LayoutMismatch(PDError):
    """Two agents cannot exchange blocks; ``diff`` says why, one sentence per difference."""

    def __init__(self, message: str, diff: Sequence[str] = ()) -> None:
        super().__init__(message if not diff else f"{message}: {'; '.join(diff)}")
        self.diff = tuple(diff)


class PeerLost(PDError):
    """A peer vanished, restarted or stopped answering before the work with it was finished."""


class LeaseExpired(PDError):
    """The owner no longer holds the blocks under the epoch that the ticket names; ``again`` if it will hold others for
    the same request under the next one."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class TransferFailed(PDError):
    """A pull ended without usable bytes; ``failed_blocks`` are destination block ids that hold nothing of value."""

    def __init__(self, message: str, failed_blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.failed_blocks = tuple(failed_blocks)


class Abandoned(TransferFailed):
    """An agent closed while a device that does not answer may still write into the pull's blocks: they must never be
    used again, and only the end of the process frees them. ``failed_blocks`` is empty: none is given back."""


class TransportUnavailable(PDError):
    """A transport cannot be used here; ``reason`` says why and what would make it usable."""

    def __init__(self, transport: str, reason: str) -> None:
        super().__init__(f"transport {transport!r} is unavailable: {reason}")
        self.transport = transport
        self.reason = reason
