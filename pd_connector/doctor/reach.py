"""Over which transports the memory of one agent can be read from here, which one is taken, and how fast each is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec

from pd_connector.config import Config
from pd_connector.doctor.greeting import without_key
from pd_connector.doctor.link import Figures, Link, Target
from pd_connector.doctor.report import Row, State, TransportRow, Use
from pd_connector.doctor.server import MODEL, without
from pd_connector.errors import TransferFailed, TransportUnavailable
from pd_connector.protocol.messages import Welcome
from pd_connector.runtime.courier import transport_options
from pd_connector.transport import registry
from pd_connector.transport.base import Transport


def beside(config: Config) -> Config:
    """For an agent of ours that runs beside the one this configuration is of, whose ports are taken: nobody needs to
    reach it, and it has no model."""
    options = without(config, "host", "port", "advertise")
    return msgspec.structs.replace(config, host="127.0.0.1", port=0, advertise="", model="", transport_options=options)


class Surveyor:
    """The transports that ``config`` starts here. ``target`` is read into; without it nothing is read."""

    def __init__(self, config: Config, target: Target | None) -> None:
        self._started, self._missing = registry.start(config.transport, "pdc-doctor", transport_options(config))
        self._target = target
        if target is None:
            return
        for name, transport in list(self._started.items()):
            if reason := registry.unfit(transport, [target.cache.region.kind]):
                self._missing[name] = reason
                self._started.pop(name).close()
            else:
                transport.register([target.cache.region])

    def close(self) -> None:
        for transport in self._started.values():
            transport.close()

    def survey(self, owner: Welcome, address: str) -> list[TransportRow]:
        """The chosen transport first, those that cannot be used last."""
        offers = owner.transports
        try:
            chosen, reasons = registry.choose(self._started, offers)
        except TransportUnavailable:
            chosen, reasons = "", {}
        rows = []
        for name in [*self._started, *(name for name in offers if name not in self._started)]:
            why_not = self._missing.get(name) or _why_not(name, self._started, offers)
            if why_not:
                rows.append(TransportRow(owner.agent, name, Use.UNUSABLE, why_not))
                continue
            use = Use.CHOSEN if name == chosen else Use.USABLE
            rows.append(self._try(owner, address, name, use, reasons.get(name, "")))
        offered = {row.transport for row in rows}
        rows += [
            TransportRow(owner.agent, name, Use.UNUSABLE, reason)
            for name, reason in self._missing.items()
            if name not in offered
        ]
        return sorted(rows, key=lambda row: row.state is Use.UNUSABLE)

    def _try(self, owner: Welcome, address: str, name: str, use: Use, reason: str) -> TransportRow:
        peer = f"{owner.agent}#{owner.src:016x}@{without_key(address)}"
        try:
            with _link(self._started[name], peer) as link:
                connect = link.connect(owner.transports[name])
                figures: Figures | None = None
                if self._target is not None and owner.model == MODEL:
                    figures = link.measure(self._target)
        except TransferFailed as error:
            return TransportRow(owner.agent, name, Use.FAILED, str(error))
        row = TransportRow(owner.agent, name, use, reason, connect_ms=_round(connect * 1e3))
        if figures is None:
            return row
        return msgspec.structs.replace(row, gbps=_round(figures.gbps), latency_us=_round(figures.latency_us))


def verdict(name: str, rows: list[TransportRow]) -> Row:
    """One check out of the transports to one agent."""
    failed = [row for row in rows if row.state is Use.FAILED]
    usable = [row.transport for row in rows if row.state in (Use.CHOSEN, Use.USABLE)]
    if failed:
        words = "; ".join(f"{row.transport}: {row.reason}" for row in failed)
        others = f"set transport to {', '.join(usable)}" if usable else "none other is left"
        return Row(name, State.FAIL, words, f"mend what it names; until then {others}")
    if not usable:
        words = "; ".join(f"{row.transport}: {row.reason}" for row in rows)
        return Row(name, State.FAIL, f"none can be used: {words}", "make one usable: its reason says what it lacks")
    others = f"; {', '.join(usable[1:])} would do too" if usable[1:] else ""
    return Row(name, State.OK, f"{usable[0]}{others}")


def _why_not(name: str, started: Mapping[str, Transport], offers: Mapping[str, bytes]) -> str:
    """Why the registry would not take it even if there were no other; empty when it would."""
    ours = {name: started[name]} if name in started else {}
    theirs = {name: offers[name]} if name in offers else {}
    try:
        registry.choose(ours, theirs)
    except TransportUnavailable as error:
        return error.reason.removeprefix(f"{name}: ")
    return ""


@contextmanager
def _link(transport: Transport, peer: str) -> Iterator[Link]:
    try:
        yield Link(transport, peer)
    finally:
        transport.disconnect(peer)


def _round(value: float) -> float:
    """To three digits that count."""
    return round(value, max(0, 2 - math.floor(math.log10(value)))) if value > 0 else value
