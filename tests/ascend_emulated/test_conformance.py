"""The conformance suite between emulated NPUs. Not run on hardware."""

from __future__ import annotations

import pytest

from pd_connector.memory import native
from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.transport.base import Transport
from pd_connector.transport.hccl import HcclTransport
from pd_connector.transport.hixl import HixlTransport
from pd_connector.transport.staged import StagedShm, StagedTcp

from .device import NPU

pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")


@pytest.mark.slow
class TestHixl(TransportConformance):
    memory = target_memory = NPU

    def make(self, agent: str) -> Transport:
        return HixlTransport(agent, {})


class TestHixlBetweenProcesses(ProcessConformance):
    owner_spec = ("hixl", {})
    memory = target_memory = NPU

    def make(self, agent: str) -> Transport:
        return HixlTransport(agent, {})


class TestHccl(TransportConformance):
    memory = target_memory = NPU

    def make(self, agent: str) -> Transport:
        return HcclTransport(agent, {})


@pytest.mark.slow
class TestHcclBetweenProcesses(ProcessConformance):
    owner_spec = ("hccl", {})
    memory = target_memory = NPU

    def make(self, agent: str) -> Transport:
        return HcclTransport(agent, {})


@pytest.mark.slow
class TestStagedOverTcp(TransportConformance):
    memory = target_memory = NPU

    def make(self, agent: str) -> Transport:
        return StagedTcp(agent, {})


class TestStagedOverShmBetweenProcesses(ProcessConformance):
    owner_spec = ("staged-shm", {})
    memory = target_memory = NPU

    def make(self, agent: str) -> Transport:
        return StagedShm(agent, {})
