"""The router as a small peer on the instances' side channel: it gives tickets back, and is told where the time went."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from pd_connector.config import Config, is_loopback
from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import Account, Saved
from pd_connector.protocol.params import from_params
from pd_connector.runtime.agent import Agent

logger = logging.getLogger(__name__)

_MOST_ACCOUNTS = 2
"""Of one hand-over: P's and D's."""


OnSaved = Callable[[bytes, bytes, float, str], None]
"""(id of the hand-over, ticket as Ticket.to_bytes or nothing, seconds that it is held, why there is none)."""


class Broker(Protocol):
    """Our side channel to the instances: tells a prefill instance that nobody will read the blocks of a ticket, and is
    told by both instances where the time of a hand-over went."""

    def address_for(self, url: str) -> str:
        """Where the instance behind a URL reaches us; empty when it cannot."""

    def expect(self, of: bytes) -> None:
        """Keep what instances tell about a hand-over, until ``forget``."""

    def accounts(self, of: bytes) -> Sequence[Account]:
        """What they told so far."""

    def forget(self, of: bytes) -> None: ...

    def listen(self, on_saved: OnSaved) -> None:
        """Be told what decode instances keep of turns."""

    async def release(self, params: dict[str, Any]) -> None:
        """Send RELEASE for the ticket in these kv_transfer_params. Idempotent, returns within 1 s, does not raise."""

    async def renounce(self, address: str, transfer: bytes) -> None:
        """The same for the lease of a capability, granted or not yet, at the agent of that address."""


class AgentBroker:
    """A Broker over an agent of its own, on the router's loop; ``async with AgentBroker(config) as broker``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._agent = Agent(config, on_note=self._noted)
        self._accounts: dict[bytes, list[Account]] = {}
        self._on_saved: OnSaved | None = None

    async def __aenter__(self) -> AgentBroker:
        self._agent.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._agent.close()

    def address_for(self, url: str) -> str:
        here = is_loopback(urlsplit(url).hostname or "")
        return self._agent.address if here or not is_loopback(self._config.host) else ""

    async def release(self, params: dict[str, Any]) -> None:
        """Send RELEASE for the whole ticket. Returns at once and never raises: the frame leaves in the background, and
        one that is lost costs no more than the lease's own deadline. A ticket that is not ours is logged."""
        try:
            ticket = from_params(params)
        except RemoteProtocolError as error:
            logger.warning("a ticket cannot be released, its lease has to run out: %s", error)
            return
        self._agent.release(ticket, whole=True)

    async def renounce(self, address: str, transfer: bytes) -> None:
        """As ``release``, by the capability alone: also of a ticket that has not been given, or never arrived."""
        self._agent.disclaim(address, transfer, renounce=True)

    def expect(self, of: bytes) -> None:
        self._accounts[of] = []

    def accounts(self, of: bytes) -> list[Account]:
        return self._accounts.get(of, [])

    def forget(self, of: bytes) -> None:
        self._accounts.pop(of, None)

    def listen(self, on_saved: OnSaved) -> None:
        self._on_saved = on_saved

    def _noted(self, note: ev.Note) -> None:
        match note:
            case ev.Informed(Account() as account):
                known = self._accounts.get(account.of)
                if known is not None and len(known) < _MOST_ACCOUNTS:
                    known.append(account)
            case ev.Informed(Saved() as saved) if self._on_saved is not None:
                self._on_saved(saved.of, saved.ticket, saved.remaining_ms / 1e3, saved.reason)
            case _:
                pass
