"""The conformance suite over real verbs: reading and writing, one process and two, plain and in a FaultyTransport."""

from __future__ import annotations

from pd_connector.testing.conformance import ProcessConformance, TransportConformance
from pd_connector.testing.faults import FaultyTransport
from pd_connector.transport.base import Transport
from pd_connector.transport.verbs import VerbsTransport


class TestVerbs(TransportConformance):
    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {})


class TestVerbsBetweenProcesses(ProcessConformance):
    owner_spec = ("verbs", {})

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {})


class TestVerbsInSmallRegistrations(TransportConformance):
    """Runs that cross from one registration into the next, one read at a time, completions looked for."""

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"max_mr_bytes": 12288, "queue_pairs": 1, "max_reads": 1, "poll_us": 200})


class TestVerbsThatWrite(TransportConformance):
    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"wire_verb": "write"})


class TestVerbsThatWriteBetweenProcesses(ProcessConformance):
    owner_spec = ("verbs", {"max_mr_bytes": 65536})

    def make(self, agent: str) -> Transport:
        return VerbsTransport(agent, {"wire_verb": "write", "max_mr_bytes": 20480})


class TestFaultyVerbs(TransportConformance):
    def make(self, agent: str) -> Transport:
        return FaultyTransport(agent, {"inner": "verbs"})
