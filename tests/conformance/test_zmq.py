"""The conformance suite over zmq: one process, two processes, plain and inside an idle FaultyTransport."""

from __future__ import annotations

import pytest

from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.faults import FaultyTransport
from pd_connector.transport.base import Transport
from pd_connector.transport.zmq import ZmqTransport


class TestZmq(TransportConformance):
    def make(self, agent: str) -> Transport:
        return ZmqTransport(agent, {})


@pytest.mark.slow
class TestFaultyZmq(TransportConformance):
    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "zmq"})


class TestZmqBetweenProcesses(ProcessConformance):
    owner_spec = ("zmq", {})

    def make(self, agent: str) -> Transport:
        return ZmqTransport(agent, {})


class TestFaultyZmqBetweenProcesses(ProcessConformance):
    owner_spec = ("zmq", {})

    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "zmq"})
