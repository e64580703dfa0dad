"""Which transport serves a pair of agents when the best one does not come up."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from pd_connector import Agent, Config, TransferFailed, TransportUnavailable
from pd_connector.testing.fault_script import FaultScript, Rule
from pd_connector.transport import registry
from pd_connector.transport.base import Status
from pd_connector.transport.inproc import InprocTransport

BLOCKS, BYTES = 8, 4096
REFUSES = Rule(action="fail", on="connect", status=Status.PEER_LOST)
SILENT = Rule(action="drop", on="connect")


def reader(*transports: str, rule: Rule = REFUSES) -> Agent:
    """One whose inproc never connects."""
    options = {"faulty": {"inner": "inproc", "script": FaultScript([rule])}}
    return Agent(Config(transport=transports, transport_options=options), name="D")


async def read_over_zmq(p: Agent, d: Agent, source: Any, target: Any) -> dict[str, str]:
    """The first pull goes over zmq and is right; why the others were not taken."""
    p.register(list(source))
    d.register(list(target))
    stats = await d.pull(p.lease([0, 1, 2]), [5, 6, 7])
    assert stats.transport == "zmq"
    assert (target[:, 5:] == source[:, :3]).all()
    (reasons,) = d.transport_reasons().values()
    return reasons


async def test_the_next_best_is_tried_and_the_reason_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_connector")
    source = np.random.default_rng(3).integers(1, 255, (2, BLOCKS, BYTES), np.uint8)
    target = np.zeros_like(source)
    async with Agent(Config(transport=("inproc", "zmq")), name="P") as p, reader("faulty", "zmq") as d:
        reasons = await read_over_zmq(p, d, source, target)
        assert reasons["inproc"].startswith("peer_lost")
        await d.pull(p.lease([3]), [0])  # the choice holds
        assert (target[:, 0] == source[:, 3]).all()
    lines = [record.getMessage() for record in caplog.records if " is read over " in record.getMessage()]
    assert ["over inproc" in line for line in lines] == [True, False], lines
    assert "inproc: peer_lost" in lines[1]


async def test_one_that_never_answers_is_given_up_in_time_for_the_next() -> None:
    source = np.random.default_rng(3).integers(1, 255, (2, BLOCKS, BYTES), np.uint8)
    target = np.zeros_like(source)
    async with Agent(Config(transport=("inproc", "zmq")), name="P") as p, reader("faulty", "zmq", rule=SILENT) as d:
        reasons = await read_over_zmq(p, d, source, target)
        assert reasons == {"inproc": "no connection within 2 s"}
        assert d._courier is not None
        assert not d._courier._transports["inproc"]._jobs, "the attempt was not ended"  # type: ignore[attr-defined]


async def test_the_last_one_has_all_the_time_of_the_session() -> None:
    memory = np.ones((2, BLOCKS, BYTES), np.uint8)
    async with Agent(Config(transport=("inproc",)), name="P") as p, reader("faulty", rule=SILENT) as d:
        p.register(list(memory))
        d.register(list(memory.copy()))
        with pytest.raises(TransferFailed, match="did not finish connecting a transport within 5 s"):
            await d.pull(p.lease([0]), [0], timeout=10)


async def test_a_peer_that_no_transport_reaches_is_given_up_with_every_reason() -> None:
    memory = np.ones((2, BLOCKS, BYTES), np.uint8)
    async with Agent(Config(transport=("inproc",)), name="P") as p, reader("faulty") as d:
        p.register(list(memory))
        d.register(list(memory.copy()))
        ticket = p.lease([0])
        with pytest.raises(TransferFailed, match="inproc: peer_lost"):
            await d.pull(ticket, [0], timeout=10)


class Greedy(InprocTransport):
    """One that takes no memory."""

    def register(self, regions: Any) -> None:
        raise TransportUnavailable("inproc", "it is full")


async def test_one_that_cannot_register_is_left_out_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.load
    monkeypatch.setattr(registry, "load", lambda name: Greedy if name == "inproc" else real(name))
    source = np.ones((2, BLOCKS, BYTES), np.uint8)
    async with Agent(Config()) as p:
        p.register(list(source))
        offered = p.core.identity.transports
        assert "inproc" not in offered
        assert "zmq" in offered
    for transports in (("inproc",), ("inproc", "zmq")):
        async with Agent(Config(transport=transports)) as p:
            with pytest.raises(TransportUnavailable, match="it is full"):
                p.register(list(source))
