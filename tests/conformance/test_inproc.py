"""The conformance suite over inproc, plain and inside an idle FaultyTransport."""

from __future__ import annotations

from pd_connector.testing.conformance import TransportConformance
from pd_connector.testing.faults import FaultyTransport
from pd_connector.transport.base import Transport
from pd_connector.transport.inproc import InprocTransport


class TestInproc(TransportConformance):
    def make(self, agent: str) -> Transport:
        return InprocTransport(agent, {})


class TestFaultyInproc(TransportConformance):
    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "inproc"})
