"""The conformance suite between two guests, each with a kernel and a device of its own."""

from __future__ import annotations

import pytest

from pd_connector.testing.conformance import ProcessConformance
from pd_connector.testing.owner_process import Owner
from pd_connector.testing.pair import SEED
from pd_connector.transport.base import Transport
from pd_connector.transport.verbs import VerbsTransport

from .other import ADDRESS, FarOwner

pytestmark = pytest.mark.skipif(not ADDRESS, reason="needs a second guest")


class TestVerbsAcross(ProcessConformance):
    owner_spec = ("verbs", {"host": ADDRESS})

    def make_owner(self, geometry: str) -> Owner:
        return FarOwner(*self.owner_spec, geometry, SEED)

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"host": "10.77.0.2"})


class TestVerbsThatWriteAcross(TestVerbsAcross):
    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"host": "10.77.0.2", "wire_verb": "write"})
