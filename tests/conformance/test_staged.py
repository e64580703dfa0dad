"""The conformance suite over staged transports with the processor as the device: one process and two, and Faulty."""

from __future__ import annotations

import pytest

from pd_connector.memory import native
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.faults import FaultyTransport
from pd_connector.transport.base import Transport
from pd_connector.transport.staged import StagedShm, StagedTcp, StagedZmq

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


@pytest.mark.slow
class TestStagedZmq(TransportConformance):
    def make(self, agent: str) -> Transport:
        return StagedZmq(agent, {})


class TestStagedTcp(TransportConformance):
    def make(self, agent: str) -> Transport:
        return StagedTcp(agent, {})


@pytest.mark.slow
class TestStagedShm(TransportConformance):
    def make(self, agent: str) -> Transport:
        return StagedShm(agent, {})


@pytest.mark.slow
class TestStagedWithOneSmallSlot(TransportConformance):
    def make(self, agent: str) -> Transport:
        return StagedShm(agent, {"slots": 1, "slot_bytes": 65536 + 4096})


@pytest.mark.slow
class TestFaultyStagedZmq(TransportConformance):
    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "staged-zmq"})


@pytest.mark.slow
class TestStagedZmqBetweenProcesses(ProcessConformance):
    owner_spec = ("staged-zmq", {})

    def make(self, agent: str) -> Transport:
        return StagedZmq(agent, {})


@pytest.mark.slow
class TestStagedTcpBetweenProcesses(ProcessConformance):
    owner_spec = ("staged-tcp", {})

    def make(self, agent: str) -> Transport:
        return StagedTcp(agent, {})


class TestStagedShmBetweenProcesses(ProcessConformance):
    owner_spec = ("staged-shm", {})

    def make(self, agent: str) -> Transport:
        return StagedShm(agent, {})


@pytest.mark.slow
class TestFaultyStagedTcpBetweenProcesses(ProcessConformance):
    owner_spec = ("staged-tcp", {})

    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "staged-tcp"})
