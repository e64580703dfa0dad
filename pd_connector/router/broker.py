"""The router as a small peer on the instances' side channel: it gives tickets back, and is told where the time went."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import urlsplit

from pd_connector.config import Config, is_loopback
from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import Account
from pd_connector.protocol.params import from_params
from pd_connector.runtime.agent import Agent

logger = logging.getLogger(__name__)

_MOST_ACCOUNTS = 2
"""Of one hand-over: P's and D's."""


class AgentBroker:
    """A legs.Broker over an agent of its own, on the router's loop; ``async with AgentBroker(config) as broker``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._agent = Agent(config, on_note=self._noted)
        self._accounts: dict[bytes, list[Account]] = {}

    async def __aenter__(self) -> AgentBroker:
        self._agent.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._agent.close()

    def address_for(self, url: str) -> str:
        """Where the instance behind a URL reaches us; empty when it cannot."""
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
        """Keep what instances tell about a hand-over, until it is forgotten."""
        self._accounts[of] = []

    def accounts(self, of: bytes) -> list[Account]:
        """What they told so far."""
        return self._accounts.get(of, [])

    def forget(self, of: bytes) -> None:
        self._accounts.pop(of, None)

    def _noted(self, note: ev.Note) -> None:
        if isinstance(note, ev.Informed):
            known = self._accounts.get(note.account.of)
            if known is not None and len(known) < _MOST_ACCOUNTS:
                known.append(note.account)
