"""Audits: both sides digest every block and grid, and the verdict compares them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pd_connector.plan import Place
from pd_connector.protocol import events as ev
from pd_connector.protocol import messages as m
from pd_connector.protocol.context import Limits

from .bench import CAPABILITY, Agent, Bench, plan, ready_pair


@pytest.fixture
def bench() -> Bench:
    return Bench()


def digest(agent: Agent, wrong: int | None = None) -> list[ev.DigestBlocks]:
    """Answer the digests an agent was asked for: equal on both sides, but for the one with the index ``wrong``."""
    jobs = agent.take(ev.DigestBlocks)
    for job in jobs:
        count = sum(len(side.blocks) * len(side.places) for side in job.sides)
        digests = [bytes([n]) * 8 for n in range(count)]
        if wrong is not None:
            digests[wrong] = b"\xff" * 8
        agent.feed(ev.Digested(job.job, b"".join(digests)))
    return jobs


def read(bench: Bench, owner: Agent, reader: Agent, lease: int = 2) -> int:
    number = reader.pull(owner.grant(lease), plan((1, 2), (7, 8)), audit=True)
    bench.settle()
    reader.complete()
    return number


def test_equal_digests(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = read(bench, owner, reader)
    (job,) = digest(reader)
    assert [(side.blocks.tolist(), side.places) for side in job.sides] == [([7, 8], (Place(0, 0, 64), Place(1, 0, 64)))]
    bench.settle()
    assert reader.outcome(number) is None
    (job,) = digest(owner)
    assert [(side.blocks.tolist(), side.places) for side in job.sides] == [([1, 2], (Place(0, 0, 64), Place(1, 0, 64)))]
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"
    assert end.stats.digests_compared == 4


def test_a_difference_is_found_and_named(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = read(bench, owner, reader)
    digest(reader, wrong=3)
    bench.settle()
    digest(owner)
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "failed"
    assert "1 of 4 digests differ, first in block 2 of grid 1" in str(end.error)
    assert owner.core.counters["audit_mismatches"] == 1
    assert owner.core.counters["commits_held"] == 1, "only the pull of the fixture"
    assert len(owner.lease_ends) == 1, "the reader is done with it"


@pytest.mark.parametrize("side", ["owner", "reader"])
def test_blocks_that_cannot_be_digested(bench: Bench, side: str) -> None:
    owner, reader = ready_pair(bench)
    number = read(bench, owner, reader)
    if side == "owner":
        digest(reader)
        bench.settle()
    agent = owner if side == "owner" else reader
    for job in agent.take(ev.DigestBlocks):
        agent.feed(ev.Digested(job.job, None))
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "failed"
    assert "digest" in str(end.error)


def test_a_lease_that_ends_while_its_blocks_are_digested(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = read(bench, owner, reader)
    digest(reader)
    bench.settle()
    owner.feed(ev.End(2, "preempted"))
    digest(owner)
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert "preempted" in str(end.error)
    assert owner.idle()


def test_a_repeated_commit_is_digested_once(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = read(bench, owner, reader)
    digest(reader)
    bench.wait(2.0)
    assert len(reader.said(m.Commit)) > 2
    assert len(digest(owner)) == 1
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"


def test_an_abort_while_digesting(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = read(bench, owner, reader)
    (job,) = [command for command in reader.commands if isinstance(command, ev.DigestBlocks)]
    reader.feed(ev.Abort(number))
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "aborted"
    reader.feed(ev.Digested(job.job, b""))
    assert reader.core.counters["late_events"] == 1
    bench.settle()
    assert reader.idle()


def test_parts_without_blocks_have_nothing_to_audit(bench: Bench) -> None:
    owner, reader = ready_pair(bench)
    number = reader.pull(owner.grant(2), plan((), ()), audit=True)
    bench.settle()
    digest(reader)
    bench.settle()
    end = reader.outcome(number)
    assert end is not None
    assert end.outcome == "done"


def read_of(*blocks: int, place: Any = (0, 0, 64, ())) -> m.AuditPlan:
    return m.AuditPlan(np.array(blocks, "<u4").tobytes(), (place,))


@pytest.mark.parametrize(
    ("audit", "words"),
    [
        (m.Audit((m.AuditPlan(b"odd", ((0, 0, 64, ()),)),), b""), "malformed"),
        (m.Audit((), b""), "number of digests"),
        (m.Audit((read_of(1, place=(2, 0, 64, ())),), b"x" * 8), "grid that does not exist"),
        (m.Audit((read_of(1, place=(0, 1, 64, ())),), b"x" * 8), "do not lie in a block"),
        (m.Audit((read_of(1, place=(0, 0, 0, ())),), b"x" * 8), "do not lie in a block"),
        (m.Audit((read_of(1, place=(0, 0, 8, ((0, 8),))),), b"x" * 8), "do not lie in a block"),
        (m.Audit((read_of(1, place=(0, 0, 8, ((2, 57),))),), b"x" * 8), "do not lie in a block"),
        (m.Audit((read_of(1, place=(0, 0, 8, ((2**50, 0),))),), b"x" * 8), "do not lie in a block"),
        (m.Audit((read_of(1),), b"x" * 7), "number of digests"),
        (m.Audit((read_of(*[1] * 9),), b"x" * 72), "more bytes than are leased"),
        (m.Audit((read_of(1),) * 9, b"x" * 72), "more bytes than are leased"),
        (m.Audit((read_of(1), read_of(2)), b"x" * 8), "number of digests"),
        (m.Audit((read_of(4, 5),), b"x" * 16), "not leased"),
        (m.Audit((read_of(1), read_of(2**32 - 1)), b"x" * 16), "not leased"),
    ],
)
def test_an_audit_that_makes_no_sense(bench: Bench, audit: m.Audit, words: str) -> None:
    owner = bench.agent("p")
    owner.grant()
    fields: dict[str, Any] = {"lease": 1, "epoch": 1, "capability": CAPABILITY, "reader": "d", "final": True}
    message = m.Commit(src=7, dst=owner.incarnation, transfer=1, part=0, audit=audit, **fields)
    owner.feed(ev.Received("<d", m.encode(message)))
    (verdict,) = owner.said(m.Verdict)
    assert not verdict.held
    assert words in verdict.reason
    assert not owner.take(ev.DigestBlocks)


def test_digests_under_way_are_bounded(bench: Bench) -> None:
    owner, reader = bench.agent("p", Limits(max_digest_jobs=1)), bench.agent("d")
    numbers = [reader.pull(owner.grant(lease), audit=True) for lease in (1, 2)]
    bench.settle()
    reader.complete()
    digest(reader)
    bench.settle()
    second = reader.outcome(numbers[1])
    assert second is not None
    assert "max_digest_jobs" in str(second.error)
    digest(owner)
    bench.settle()
    first = reader.outcome(numbers[0])
    assert first is not None
    assert first.outcome == "done"


def test_an_owner_without_memory_has_nothing_to_audit(bench: Bench) -> None:
    owner = bench.agent("p", layout=None)
    owner.grant()
    fields: dict[str, Any] = {"lease": 1, "epoch": 1, "capability": CAPABILITY, "reader": "d", "final": True}
    audit = m.Audit((read_of(1),), b"x" * 8)
    message = m.Commit(src=7, dst=owner.incarnation, transfer=1, part=0, audit=audit, **fields)
    owner.feed(ev.Received("<d", m.encode(message)))
    assert not owner.said(m.Verdict)[0].held
