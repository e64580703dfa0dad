"""Driver: feeds the protocol core with events, one at a time, and carries its commands out in order. On one loop."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pd_connector.errors import LocalProtocolError
from pd_connector.memory import GridRef
from pd_connector.protocol import events as ev
from pd_connector.protocol.core import Core
from pd_connector.runtime.courier import Courier
from pd_connector.runtime.digest import digest_blocks
from pd_connector.runtime.side_channel import SideChannel
from pd_connector.runtime.windows import Windows

logger = logging.getLogger(__name__)


class Driver:
    """``note`` takes what the core says to the engine, ``refused`` the pulls that it does not start."""

    def __init__(
        self,
        core: Core,
        side_channel: SideChannel,
        note: Callable[[ev.Note], None],
        refused: Callable[[ev.Pull, LocalProtocolError], None],
    ) -> None:
        self.core = core
        self.courier: Courier | None = None
        self.windows = Windows()
        self.grids: tuple[GridRef, ...] = ()
        self.failures: Counter[str] = Counter()
        self._side_channel, self._note, self._refused = side_channel, note, refused
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._closed = False
        self._tick: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop
        self._background = ThreadPoolExecutor(1, thread_name_prefix="pdc-background")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def clock(self) -> float:
        return self._loop.time()

    async def close(self) -> None:
        """Take no events any more."""
        self._closed = True
        if self._tick is not None:
            self._tick.cancel()
        await self._loop.run_in_executor(None, self._background.shutdown)
        self.windows.close()

    # --- events -------------------------------------------------------------------------------------------------------

    def feed(self, event: ev.Event) -> None:
        """Handle an event that cannot be refused, now or after the ones being handled."""
        if self._closed:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._take(self._events.popleft())
        finally:
            self._handling = False
            self._schedule()

    def handle(self, event: ev.Meet | ev.Grant | ev.Grow) -> None:
        """Handle a local call that may be refused: raises what the core raises."""
        if self._closed:
            raise LocalProtocolError("this agent is closed")
        if self._handling:
            raise LocalProtocolError("leases and pulls cannot be started inside on_note; schedule them on the loop")
        self._handling = True
        try:
            self._execute(self.core.handle(event, self.clock()))
        finally:
            self._handling = False
        self.feed(ev.Tick())

    def _take(self, event: ev.Event) -> None:
        try:
            self._execute(self.core.handle(event, self.clock()))
        except LocalProtocolError as error:
            if not isinstance(event, ev.Pull):
                raise
            self._refused(event, error)

    def _schedule(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        deadline = self.core.next_deadline()
        if deadline is not None and not self._closed:
            self._tick = self._loop.call_at(deadline, self.feed, ev.Tick())

    # --- commands -----------------------------------------------------------------------------------------------------

    def _execute(self, commands: Sequence[ev.Command]) -> None:
        """Carry commands out in order. One that fails costs itself alone: behind it may stand the end of a lease."""
        for command in commands:
            try:
                self._carry_out(command)
            except Exception:
                self.failures["commands_failed"] += 1
                logger.exception("%s failed", type(command).__name__)

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.Send(route, message):
                self._side_channel.send_message(route, message)
            case ev.Hangup(route):
                self._side_channel.hangup(route)
            case ev.DigestBlocks():
                self._loop.create_task(self._digest(command))
            case ev.Notify(note):
                self._note(note)
            case _:
                if self.courier is not None:
                    self.courier.carry_out(command, self.core.new_id)

    async def _digest(self, command: ev.DigestBlocks) -> None:
        args = (self.windows, self.grids, command.sides)
        try:
            digests: bytes | None = await self._loop.run_in_executor(self._background, digest_blocks, *args)
        except Exception as error:  # whatever it is, whoever asked must get an answer
            logger.warning("digest of what %d plans read failed: %s", len(command.sides), error)
            digests = None
        self.feed(ev.Digested(command.job, digests))
