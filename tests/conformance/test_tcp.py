"""The conformance suite over tcp: both versions of IP, one process and two, plain and inside a FaultyTransport."""

from __future__ import annotations

import pytest

from pd_connector.memory import native
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.faults import FaultyTransport
from pd_connector.transport.base import Transport
from pd_connector.transport.native import TcpTransport

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


class TestTcp(TransportConformance):
    def make(self, agent: str) -> Transport:
        return TcpTransport(agent, {})


@pytest.mark.slow
class TestTcpOverIpv6(TransportConformance):
    def make(self, agent: str) -> Transport:
        return TcpTransport(agent, {"host": "::1"})


@pytest.mark.slow
class TestTcpOnOneThread(TransportConformance):
    def make(self, agent: str) -> Transport:
        return TcpTransport(agent, {"threads": 1})


@pytest.mark.slow
class TestFaultyTcp(TransportConformance):
    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "tcp"})


class TestTcpBetweenProcesses(ProcessConformance):
    owner_spec = ("tcp", {})

    def make(self, agent: str) -> Transport:
        return TcpTransport(agent, {})


class TestTcpBetweenProcessesOverIpv6(ProcessConformance):
    owner_spec = ("tcp", {"host": "::1"})

    def make(self, agent: str) -> Transport:
        return TcpTransport(agent, {"host": "::1"})


class TestFaultyTcpBetweenProcesses(ProcessConformance):
    owner_spec = ("tcp", {})

    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "tcp"})
