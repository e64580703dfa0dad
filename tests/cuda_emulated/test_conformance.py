"""The conformance suite between emulated GPUs. Not run on hardware."""

from __future__ import annotations

import pytest

from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.transport.base import Transport
from pd_connector.transport.cuda import CudaTransport

from .device import GPU


@pytest.mark.slow
class TestCuda(TransportConformance):
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return CudaTransport(agent, {})


class TestCudaBetweenProcesses(ProcessConformance):
    owner_spec = ("cuda", {})
    memory = target_memory = GPU

    def make(self, agent: str) -> Transport:
        return CudaTransport(agent, {})
