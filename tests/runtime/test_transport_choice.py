"""Which transport serves a pair of agents when the best one does not come up."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from pd_connector import Agent, Config, TransferFailed
from pd_connector.testing.fault_script import FaultScript, Rule
from pd_connector.transport.base import Status

BLOCKS, BYTES = 8, 4096
REFUSES = Rule(action="fail", on="connect", status=Status.PEER_LOST)


def reader(*transports: str) -> Agent:
    """One whose inproc never connects."""
    options = {"faulty": {"inner": "inproc", "script": FaultScript([REFUSES])}}
    return Agent(Config(transport=transports, transport_options=options), name="D")


async def test_the_next_best_is_tried_and_the_reason_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_connector")
    source = np.random.default_rng(3).integers(1, 255, (2, BLOCKS, BYTES), np.uint8)
    target = np.zeros_like(source)
    async with Agent(Config(transport=("inproc", "zmq")), name="P") as p, reader("faulty", "zmq") as d:
        p.register(list(source))
        d.register(list(target))
        stats = await d.pull(p.lease([0, 1, 2]), [5, 6, 7])
        assert stats.transport == "zmq"
        assert (target[:, 5:] == source[:, :3]).all()
        (reasons,) = d.transport_reasons().values()
        assert reasons["inproc"].startswith("peer_lost")
        await d.pull(p.lease([3]), [0])  # the choice holds
        assert (target[:, 0] == source[:, 3]).all()
    lines = [record.getMessage() for record in caplog.records if " is read over " in record.getMessage()]
    assert ["over inproc" in line for line in lines] == [True, False], lines
    assert "inproc: peer_lost" in lines[1]


async def test_a_peer_that_no_transport_reaches_is_given_up_with_every_reason() -> None:
    memory = np.ones((2, BLOCKS, BYTES), np.uint8)
    async with Agent(Config(transport=("inproc",)), name="P") as p, reader("faulty") as d:
        p.register(list(memory))
        d.register(list(memory.copy()))
        ticket = p.lease([0])
        with pytest.raises(TransferFailed, match="inproc: peer_lost"):
            await d.pull(ticket, [0], timeout=10)
