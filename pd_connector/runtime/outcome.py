"""How a pull ends for its caller."""

from __future__ import annotations

import asyncio
import contextlib

from pd_connector.errors import TransferFailed
from pd_connector.protocol import events as ev


async def patiently(future: asyncio.Future[ev.TransferEnded]) -> None:
    """Wait for the end even when cancelled again: until then somebody may write into the destination."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])


def stats_of(note: ev.TransferEnded) -> ev.TransferStats:
    """Raises TransferFailed."""
    if note.outcome == "done":
        return note.stats
    raise TransferFailed(str(note.error), note.failed_blocks) from note.error
