"""pd_connector: moves KV-cache blocks between prefill and decode instances.

The names below are the public API. They load on first use, so that importing the package costs nothing and loads
neither an engine nor a native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pd_connector.config import Config
    from pd_connector.errors import (
        Abandoned,
        ConfigError,
        LayoutMismatch,
        LeaseExpired,
        LocalProtocolError,
        PDError,
        PeerLost,
        RemoteProtocolError,
        TransferFailed,
        TransportUnavailable,
    )
    from pd_connector.layout import Form, GroupLayout, KVLayout, Part, heads_of_rank, strided_parts
    from pd_connector.memory import BlockGrid, MemoryKind, Region, shared_pool
    from pd_connector.protocol.events import TransferStats
    from pd_connector.protocol.ticket import Ticket
    from pd_connector.runtime.agent import Agent
    from pd_connector.runtime.portal import Portal

_HOMES = {
    "runtime.agent": ("Agent",),
    "runtime.portal": ("Portal",),
    "config": ("Config",),
    "protocol.ticket": ("Ticket",),
    "protocol.events": ("TransferStats",),
    "layout": ("Form", "GroupLayout", "KVLayout", "Part", "heads_of_rank", "strided_parts"),
    "memory": ("BlockGrid", "MemoryKind", "Region", "shared_pool"),
    "errors": (
        "Abandoned",
        "ConfigError",
        "LayoutMismatch",
        "LeaseExpired",
        "LocalProtocolError",
        "PDError",
        "PeerLost",
        "RemoteProtocolError",
        "TransferFailed",
        "TransportUnavailable",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Abandoned",
    "Agent",
    "BlockGrid",
    "Config",
    "ConfigError",
    "Form",
    "GroupLayout",
    "KVLayout",
    "LayoutMismatch",
    "LeaseExpired",
    "LocalProtocolError",
    "MemoryKind",
    "PDError",
    "Part",
    "PeerLost",
    "Portal",
    "Region",
    "RemoteProtocolError",
    "Ticket",
    "TransferFailed",
    "TransferStats",
    "TransportUnavailable",
    "heads_of_rank",
    "shared_pool",
    "strided_parts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
