"""A router's agent, that keeps what engines tell it."""

from __future__ import annotations

from typing import Any

from pd_connector import Config
from pd_connector.protocol import events as ev
from pd_connector.protocol.messages import Account, Saved
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.portal import Portal


class Listener:
    def __init__(self, config: Config | None = None) -> None:
        self.told: list[Account] = []
        self.saved: list[Saved] = []
        self._portal = Portal("listener")
        self.agent = Agent(config, on_note=self._noted)
        self._portal.call(self.agent.start)
        self.address = self.agent.address

    def _noted(self, note: ev.Note) -> None:
        match note:
            case ev.Informed(Account() as account):
                self.told.append(account)
            case ev.Informed(Saved() as saved):
                self.saved.append(saved)
            case _:
                pass

    def times(self, kind: type[Any]) -> Any:
        (found,) = (account.times for account in self.told if isinstance(account.times, kind))
        return found

    def call(self, function: Any, *args: Any) -> Any:
        return self._portal.call(function, *args)

    def close(self) -> None:
        self._portal.run(self.agent.close(), timeout=10)
        self._portal.close()
