"""Gives tickets back over the side channel: the router as a small peer without memory of its own."""

from __future__ import annotations

import logging
from typing import Any

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.params import from_params
from pd_connector.runtime.agent import Agent

logger = logging.getLogger(__name__)


class AgentReleaser:
    """A legs.Releaser over an agent that runs on the router's loop and needs no registered memory."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

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
