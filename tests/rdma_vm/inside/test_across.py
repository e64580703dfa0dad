"""The conformance suite between two guests, each with a kernel and a device of its own."""

from __future__ import annotations

import pytest

from pd_connector.plan import CopyPlan, coalesce, whole_patterns
from pd_connector.testing.conformance import ProcessConformance
from pd_connector.testing.owner_process import Owner
from pd_connector.testing.pair import SEED, Pair
from pd_connector.transport.base import Status, Transport
from pd_connector.transport.verbs import VerbsTransport

from .cable import Cable
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


@pytest.mark.parametrize("most", [1, 2, 16])
def test_reads_under_way(most: int) -> None:
    """As the packets on the cable say: never more than the queue pair was told, and more than one where it may."""
    owner = FarOwner("verbs", {"host": ADDRESS}, "mixed", SEED)
    options = {"host": "10.77.0.2", "queue_pairs": 1, "max_reads": most}
    reader = VerbsTransport("reader", options)
    try:
        over = Pair(reader, owner, "mixed")
        plan = CopyPlan(coalesce(range(0, 48, 2), range(1, 48, 2)), whole_patterns(over.target.grids, 0))
        before = reader.counters()["requests"]
        with Cable("eth0") as cable:
            assert over.wait(over.read(plan)).status is Status.DONE
        asked, under_way = cable.reads()
        assert asked == reader.counters()["requests"] - before
        assert under_way <= most
        assert (under_way > 1) == (most > 1), "a control: a queue pair that may have several under way has them"
    finally:
        reader.close()
        owner.close()
