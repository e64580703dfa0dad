"""What every request of one router is served with."""

from __future__ import annotations

from dataclasses import dataclass

from pd_connector.router.books import Books
from pd_connector.router.broker import Broker
from pd_connector.router.settings import RouterSettings
from pd_connector.router.turns import Turns
from pd_connector.router.upstream import Fleet


@dataclass(frozen=True, slots=True)
class Means:
    fleet: Fleet
    settings: RouterSettings
    broker: Broker
    books: Books
    turns: Turns
