"""FaultyTransport does what its script says, no more and no less."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_connector.errors import ConfigError, LocalProtocolError
from pd_connector.plan import CopyPlan, Pattern, coalesce
from pd_connector.testing.faults import FaultScript, FaultyTransport, Rule, read_events, wait_for_event, write_script
from pd_connector.testing.faults import halve as halve_plan
from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import PEER, SEED, Pair, random_plan
from pd_connector.transport.base import Completion, Status
from pd_connector.transport.inproc import InprocTransport
from pd_connector.transport.zmq import ZmqTransport

WAIT_S = 20.0


class Faulty:
    """A pair whose reader is faulty, and the script that steers it."""

    def __init__(self, inner: str) -> None:
        self.script = FaultScript()
        kind = {"inproc": InprocTransport, "zmq": ZmqTransport}[inner]
        self.owner = LocalOwner(kind("owner", {}), "mixed", SEED)
        self.reader = FaultyTransport("reader", {"inner": inner, "script": self.script})
        self.pair = Pair(self.reader, self.owner, "mixed")
        self.plan = self.pair.blocks([4, 2, 9], [1, 2, 3])
        self.before = self.pair.target.snapshot()
        self.after = self.pair.target.expect(self.plan, self.pair.source, self.before)

    def untouched(self) -> bool:
        return self.pair.target.same(self.before)

    def complete(self) -> bool:
        return self.pair.target.same(self.after)

    def pump_until(self, event: str) -> None:
        self.pair.until(lambda: bool(self.script.events(event)), event)


@pytest.fixture(params=["inproc", "zmq"])
def faulty(request: pytest.FixtureRequest) -> Iterator[Faulty]:
    made = Faulty(request.param)
    yield made
    made.reader.close()
    made.owner.close()


def test_it_is_the_inner_transport_to_everybody_else(faulty: Faulty) -> None:
    reader = faulty.reader
    assert reader.wire_name == reader.inner.name != reader.name
    assert reader.traits == reader.inner.traits
    assert reader.describe() == reader.inner.describe()


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_hold_until_the_rule_is_gone(faulty: Faulty, at: str) -> None:
    faulty.script.set(Rule(action="hold", at=at))
    tag = faulty.pair.read(faulty.plan)
    faulty.pump_until("held")
    for _ in range(20):
        faulty.pair.pump(0.01)
    assert tag not in faulty.pair.ended
    assert faulty.untouched() == (at == "before")
    assert faulty.complete() == (at == "after")
    faulty.script.set()
    assert faulty.pair.wait(tag).status is Status.DONE
    assert faulty.complete()
    assert [entry["tag"] for entry in faulty.script.events("released")] == [tag]


@pytest.mark.parametrize("action", ["hold", "drop"])
@pytest.mark.parametrize("at", ["before", "middle", "after"])
@pytest.mark.parametrize("end", ["cancel", "fence", "disconnect"])
def test_what_is_parked_ends_when_told_to(faulty: Faulty, action: str, at: str, end: str) -> None:
    faulty.script.set(Rule(action=action, at=at))
    tag = faulty.pair.read(faulty.plan)
    faulty.pump_until("held" if action == "hold" else "dropped")
    seen = faulty.pair.target.snapshot()
    if end == "cancel":
        faulty.reader.cancel(tag)
    elif end == "fence":
        assert faulty.pair.wait(faulty.pair.fence()).status is Status.DONE
        assert tag in faulty.pair.ended
    else:
        faulty.reader.disconnect(PEER)
    assert faulty.pair.wait(tag).status is Status.CANCELLED
    faulty.script.set()
    time.sleep(0.05)
    faulty.pair.pump()
    assert faulty.pair.target.same(seen)


def test_delay_is_not_hold(faulty: Faulty) -> None:
    faulty.script.set(Rule(action="delay", seconds=0.05))
    assert faulty.pair.wait(faulty.pair.read(faulty.plan)).status is Status.DONE
    assert faulty.complete()
    assert faulty.script.events("delayed")


def test_fail_with_a_chosen_status(faulty: Faulty) -> None:
    faulty.script.set(Rule(action="fail", status=Status.PEER_LOST))
    assert faulty.pair.wait(faulty.pair.read(faulty.plan)).status is Status.PEER_LOST
    assert faulty.untouched()
    faulty.script.set(Rule(action="fail", at="after"))
    assert faulty.pair.wait(faulty.pair.read(faulty.plan)).status is Status.ERROR
    assert faulty.complete()


def test_corrupt_flips_one_byte_before_anybody_looks(faulty: Faulty) -> None:
    faulty.script.set(Rule(action="corrupt"))
    assert faulty.pair.wait(faulty.pair.read(faulty.plan)).status is Status.DONE
    wrong = [(a != b).sum() for a, b in zip(faulty.pair.target.arrays, faulty.after, strict=True)]
    assert sum(wrong) == 1


def test_duplicate_shows_the_completion_twice(faulty: Faulty) -> None:
    faulty.script.set(Rule(action="duplicate", nth=1))
    reader, pair = faulty.reader, faulty.pair
    reader.post_read(PEER, *_claim(), faulty.plan, 100)
    reader.post_read(PEER, *_claim(), faulty.plan, 101)
    seen: list[Completion] = []
    end = time.monotonic() + WAIT_S
    while len(seen) < 3 and time.monotonic() < end:
        seen += reader.poll(1)
    assert sorted(completion.tag for completion in seen) == [100, 100, 101]
    assert pair.target.same(faulty.after)
    assert reader.poll(8) == []


def test_nth_counts_from_when_the_rule_stands(faulty: Faulty) -> None:
    faulty.pair.settle()
    faulty.script.set(Rule(action="fail", nth=2), Rule(action="fail", nth=3, status=Status.NOT_GRANTED))
    statuses = [faulty.pair.wait(faulty.pair.read(faulty.plan)).status for _ in range(4)]
    assert statuses == [Status.DONE, Status.ERROR, Status.NOT_GRANTED, Status.DONE]


def test_connect_and_fence_can_be_struck_too(faulty: Faulty) -> None:
    faulty.script.set(Rule(on="connect", action="fail", status=Status.PEER_LOST), Rule(on="fence", action="hold"))
    assert faulty.pair.wait(faulty.pair.connect()).status is Status.PEER_LOST
    faulty.script.set(Rule(on="fence", action="hold"))
    assert faulty.pair.wait(faulty.pair.connect()).status is Status.DONE
    fence = faulty.pair.fence()
    faulty.pump_until("held")
    assert fence not in faulty.pair.ended
    faulty.script.set()
    assert faulty.pair.wait(fence).status is Status.DONE


def test_a_refused_read_is_not_remembered(faulty: Faulty) -> None:
    bad = CopyPlan(coalesce([0], [48]), (Pattern(0, 0, 0, 0, 1),))
    with pytest.raises(LocalProtocolError):
        faulty.reader.post_read(PEER, *_claim(), bad, 55)
    faulty.reader.post_read(PEER, *_claim(), faulty.plan, 55)
    assert faulty.pair.wait(55).status is Status.DONE


def test_halves_are_the_whole() -> None:
    import random

    pair = Faulty("inproc").pair
    rng = random.Random(SEED)
    plans = [random_plan(rng, pair.target.grids) for _ in range(30)]
    plans += [pair.blocks([3]), CopyPlan(coalesce([3], [5]), (Pattern(0, 0, 1, 2, 3),))]
    plans += [CopyPlan(coalesce([3, 4, 5], [5, 6, 7]), (Pattern(0, 0, 1, 2, 1),))]
    for plan in plans:
        halves = halve_plan(plan)
        assert len(halves) == 2
        assert all(half.num_bytes for half in halves)
        assert sum(half.num_bytes for half in halves) == plan.num_bytes
        together = pair.target.snapshot()
        for half in halves:
            together = pair.target.expect(half, pair.source, together)
        expected = pair.target.expect(plan, pair.source, pair.target.arrays)
        assert all((a == b).all() for a, b in zip(together, expected, strict=True))


# The script as a file


def test_a_file_steers_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    owner = LocalOwner(InprocTransport("owner", {}), "mixed", SEED)
    reader = FaultyTransport("reader", {"inner": "inproc", "script": str(path)})
    pair = Pair(reader, owner, "mixed")
    write_script(path, Rule(action="hold", id="first"))
    tag = pair.read(pair.blocks([1]))
    assert wait_for_event(path, "held", WAIT_S)["tag"] == tag
    path.write_text("{ not json")  # half a file changes nothing
    time.sleep(0.05)
    assert pair.pump() == []
    write_script(path)
    assert pair.wait(tag).status is Status.DONE
    assert wait_for_event(path, "released", WAIT_S)["pid"] == os.getpid()
    assert [entry["event"] for entry in read_events(path)][-1] == "completed"
    reader.close()
    owner.close()


def test_kill_its_own_process(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    write_script(path, Rule(action="kill", on="connect"))
    code = (
        "import sys; from pd_connector.testing.faults import FaultyTransport\n"
        "t = FaultyTransport('a', {'inner': 'zmq', 'script': sys.argv[1]}); t.connect('p', t.describe(), 1)\n"
        "print('alive')"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=WAIT_S, env=env)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""
    assert read_events(path)[-1]["event"] == "killed"


def test_kill_another_process_in_the_middle_of_a_read(faulty: Faulty) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    faulty.script.set(Rule(action="kill", at="middle", pid=victim.pid))
    assert faulty.pair.wait(faulty.pair.read(faulty.plan)).status is Status.DONE
    assert victim.wait(WAIT_S) == -signal.SIGKILL


@pytest.mark.parametrize(
    "text", ["[]", '{"rules": [{"action": "explode"}]}', '{"rules": [{"action": "hold", "whne": 1}]}', '{"rulse": []}']
)
def test_a_wrong_script_is_said_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "script.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"script\.json"):
        FaultyTransport("a", {"inner": "inproc", "script": path})


def test_wrong_options_are_said_at_once() -> None:
    for options in ({}, {"inner": "inproc", "scirpt": 1}, {"inner": "inprok"}):
        with pytest.raises(ConfigError):
            FaultyTransport("a", options)
    assert FaultyTransport.probe({})
    assert FaultyTransport.probe({"inner": "zmq"}) is None


def test_waiting_for_what_does_not_come_says_what_did(tmp_path: Path) -> None:
    script = FaultScript(path=tmp_path / "none")
    script.record("something", tag=1)
    with pytest.raises(TimeoutError, match="something"):
        script.wait("else", 0.01)
    with pytest.raises(TimeoutError):
        wait_for_event(tmp_path / "none", "else", 0.01)


def _claim() -> tuple[object, bytes]:
    from pd_connector.testing.pair import CAPABILITY, LEASE

    return LEASE, CAPABILITY
