"""The router: puts prefill and decode instances behind one OpenAI-compatible address."""

from __future__ import annotations

from pd_connector.router.app import build_app, run, serve
from pd_connector.router.broker import AgentBroker, Broker
from pd_connector.router.settings import RouterSettings

__all__ = ["AgentBroker", "Broker", "RouterSettings", "build_app", "run", "serve"]
