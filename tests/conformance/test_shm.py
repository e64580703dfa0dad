"""The conformance suite over shared memory: memory that only the kernel can reach, and memory in pools."""

from __future__ import annotations

import pytest

from pd_connector.memory import native
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.faults import FaultyTransport
from pd_connector.transport.base import Transport
from pd_connector.transport.native import ShmTransport

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


class TestShm(TransportConformance):
    def make(self, agent: str) -> Transport:
        return ShmTransport(agent, {})


@pytest.mark.slow
class TestFaultyShm(TransportConformance):
    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "shm"})


class TestShmBetweenProcesses(ProcessConformance):
    owner_spec = ("shm", {})

    def make(self, agent: str) -> Transport:
        return ShmTransport(agent, {})


class TestFaultyShmBetweenProcesses(ProcessConformance):
    owner_spec = ("shm", {})

    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "shm"})
