"""How a pull ends for its caller."""

from __future__ import annotations

import asyncio
import contextlib

from pd_connector.errors import Abandoned, TransferFailed
from pd_connector.protocol import events as ev


async def patiently(future: asyncio.Future[ev.TransferEnded]) -> None:
    """Wait for the end even when cancelled again: until then somebody may write into the destination. Raises Abandoned:
    and for ever after."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    if future.result().outcome == "abandoned":
        stats_of(future.result())


def stats_of(note: ev.TransferEnded) -> ev.TransferStats:
    """Raises TransferFailed, Abandoned."""
    if note.outcome == "done":
        return note.stats
    if note.outcome == "abandoned":
        raise Abandoned(str(note.error)) from note.error
    raise TransferFailed(str(note.error), note.failed_blocks) from note.error
