"""Worker side of conversations: host memory in which finished requests wait for the next turn, and the agent that owns
it. A request is saved as it is handed over: its blocks are leased, read and confirmed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from pd_connector.config import Config
from pd_connector.errors import ConfigError, LocalProtocolError
from pd_connector.layout import KVLayout
from pd_connector.memory import BlockGrid, MemoryKind, Region, order_grids, shared_pool
from pd_connector.protocol import events as ev
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.courier import transport_options
from pd_connector.transport import registry
from pd_connector.vllm_plugin.metadata import PoolHandshake, Save

logger = logging.getLogger(__name__)

_COPY_SECONDS = 10.0
"""How long a copy may take. The slowest transport moves 1.6 GB/s here."""


class TurnPool:
    """``regions`` and ``layout`` are those of the KV cache; every slot takes one block of each of its groups. ``saved``
    is told, on the loop, of each save's end: (lease of the pool, is it there?)."""

    def __init__(
        self,
        config: Config,
        name: str,
        model: str,
        regions: Sequence[Region],
        layout: KVLayout,
        saved: Callable[[int, bool], None],
    ) -> None:
        self._config, self._layout, self._saved = config, layout, saved
        grids = [ref.grid for ref in order_grids(regions)]
        each = sum(grid.block_bytes for grid in grids)
        self.slots = config.pool_bytes // each
        if not self.slots:
            raise ConfigError(f"pool_bytes {config.pool_bytes} is less than one block of all layers, {each} bytes")
        memory, offset, ours = shared_pool(self.slots * each), 0, []
        for grid in grids:
            ours.append(BlockGrid(grid.group, grid.layer, offset, grid.block_bytes, grid.block_bytes, self.slots))
            offset += self.slots * grid.block_bytes
        self._region = Region(memory.address, len(memory), tuple(ours), keepalive=memory)
        if config.transport == "auto" and any(region.kind is not MemoryKind.HOST for region in regions):
            # The pool is the host's, but all that it talks to have devices.
            config = replace(config, transport=registry.staged_here(transport_options(config)))
        self.agent = Agent(config, name=name)
        self.agent.identify(model)

    def start(self) -> None:
        """On the loop."""
        self._loop = asyncio.get_running_loop()
        self.agent.start()
        self.agent.register([self._region], self._layout)

    def handshake(self) -> PoolHandshake:
        me = self.agent.endpoint(self._layout.rank)
        return PoolHandshake(me.address, me.incarnation, me.layout, self.slots)

    def save(self, save: Save, owner: Agent) -> None:
        """Begin to read what ``owner``, the agent of the KV cache, has leased. ``saved`` is told exactly once."""
        target, number = save.target, save.target.lease
        source = replace(save.source, address=owner.address, incarnation=owner.incarnation)

        def ended(note: ev.TransferEnded) -> None:
            # Not within the note: it may come from the very call that leases are changed by.
            self._loop.call_soon(self._ended, save, note)

        try:
            self.agent.grant(target, seconds=self._config.pool_seconds, growing=True)
            # It is memory of this host; who waits is the engine, for blocks that it could give to others.
            self.agent.start_pull(source, target.blocks, timeout=_COPY_SECONDS, on_end=ended)
        except LocalProtocolError as error:
            ended(ev.TransferEnded(number, "failed", error))

    def _ended(self, save: Save, note: ev.TransferEnded) -> None:
        number, done = save.target.lease, note.outcome == "done"
        if done:
            try:
                tokens = [save.target.tokens] * len(save.target.blocks)
                self.agent.grow(save.target, tokens, complete=True)
            except LocalProtocolError as error:
                logger.debug("lease %d of the pool ended while it was filled: %s", number, error)
        else:
            logger.warning("a finished request could not be kept for its next turn: %s", note.error)
            self.agent.end(number, "it could not be filled")
        self._saved(number, done)

    def end(self, ends: Sequence[tuple[int, str]]) -> None:
        """On return nobody is told "held" any more."""
        for number, reason in ends:
            self.agent.end(number, reason)
