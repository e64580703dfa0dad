"""FaultyTransport: any transport, with faults at the points that a FaultScript chooses."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from pd_connector.errors import ConfigError, LocalProtocolError
from pd_connector.memory import Region, order_grids
from pd_connector.plan import CopyPlan, Runs
from pd_connector.testing.fault_script import (
    TICK_S,
    FaultScript,
    Operation,
    Rule,
    read_events,
    wait_for_event,
    write_script,
)
from pd_connector.transport.base import Completion, LeasedBlocks, LeaseId, PeerId, Status, Transport
from pd_connector.transport.registry import load
from pd_connector.transport.tags import TagBook

__all__ = ["FaultScript", "FaultyTransport", "Rule", "read_events", "wait_for_event", "write_script"]


@dataclass(frozen=True, slots=True)
class _Inner:
    """Wait for the inner transport to finish what ``start`` posts under a tag."""

    start: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Parked:
    """Wait for ``until`` (monotonic seconds), or for ``rule`` to leave the script; for neither: for ever."""

    until: float | None = None
    rule: Rule | None = None


_Outcome = tuple[Status, str]
_Steps = Generator[_Inner | _Parked, Completion, _Outcome]


@dataclass(slots=True, eq=False)
class _Job:
    tag: int
    operation: Operation
    peer: PeerId
    steps: _Steps
    parked: _Parked | None = None
    inner_tag: int | None = None
    ending: bool = False


class FaultyTransport(Transport):
    """Options: ``inner`` (a transport's name), ``inner_options``, ``script`` (a path, or a FaultScript in-process)."""

    name: ClassVar[str] = "faulty"

    def __init__(self, agent: str, options: Mapping[str, Any]) -> None:
        unknown = set(options) - {"inner", "inner_options", "script"}
        if unknown or "inner" not in options:
            raise ConfigError(
                f"transport 'faulty' needs 'inner', takes 'inner_options' and 'script', got {sorted(options)}"
            )
        script = options.get("script")
        self.script = script if isinstance(script, FaultScript) else FaultScript(path=script)
        self._agent, self._pid = agent, os.getpid()
        self.inner = load(options["inner"])(agent, options.get("inner_options", {}))
        self.traits = self.inner.traits  # type: ignore[misc]
        self._regions: Sequence[Region] = ()
        self._lock = threading.RLock()
        self._tags = TagBook()
        self._jobs: dict[int, _Job] = {}
        self._by_inner_tag: dict[int, _Job] = {}
        self._next_inner_tag = 1
        self._twice: set[int] = set()
        self._echoes: deque[Completion] = deque()
        self._ready = select.epoll()
        self._ready.register(self.inner.fileno(), select.EPOLLIN)
        self._ready.register(self._tags.doorbell.fileno(), select.EPOLLIN)
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name=f"pd-faulty-{agent}", daemon=True)
        self._ticker.start()

    @property
    def wire_name(self) -> str:
        return self.inner.wire_name

    @classmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        if not hasattr(select, "epoll"):
            return "fault injection needs epoll (Linux)"
        if "inner" not in options:
            return "option 'inner' does not say which transport to wrap"
        return load(options["inner"]).probe(options.get("inner_options", {}))

    def describe(self) -> bytes:
        return self.inner.describe()

    def can_reach(self, remote: bytes) -> str | None:
        return self.inner.can_reach(remote)

    def register(self, regions: Sequence[Region]) -> None:
        self.inner.register(regions)
        self._regions = regions

    def unregister(self) -> None:
        self.inner.unregister()
        self._regions = ()

    def grant(self, lease: LeaseId, capability: bytes, blocks: LeasedBlocks) -> None:
        self.inner.grant(lease, capability, blocks)

    def revoke(self, lease: LeaseId) -> None:
        self.inner.revoke(lease)

    def connect(self, peer: PeerId, remote: bytes, tag: int) -> None:
        self._start(tag, "connect", peer, lambda inner_tag: self.inner.connect(peer, remote, inner_tag))

    def disconnect(self, peer: PeerId) -> None:
        self._check()
        with self._lock:
            self._end(lambda job: job.peer == peer and job.operation != "fence")
            self.inner.disconnect(peer)

    def post_read(
        self, peer: PeerId, lease: LeaseId, capability: bytes, plan: CopyPlan, tag: int, priority: int = 0
    ) -> None:
        def post(part: CopyPlan) -> Callable[[int], None]:
            return lambda inner_tag: self.inner.post_read(peer, lease, capability, part, inner_tag, priority)

        self._start(tag, "post_read", peer, post(plan), plan=plan, halves=[post(half) for half in halve(plan)])

    def cancel(self, tag: int) -> None:
        self._check()
        with self._lock:
            self._end(lambda job: job.tag == tag and job.operation == "post_read")

    def fence(self, peer: PeerId, tag: int) -> None:
        def start(inner_tag: int) -> None:
            self._end(lambda job: job.peer == peer and job.operation == "post_read", tell_inner=False)
            self.inner.fence(peer, inner_tag)

        self._start(tag, "fence", peer, start)

    def poll(self, limit: int) -> list[Completion]:
        self._check_process()
        with self._lock:
            for completion in self.inner.poll(limit):
                self._on_inner(completion)
            shown = [self._echoes.popleft() for _ in range(min(limit, len(self._echoes)))]
            fresh = self._tags.take(limit - len(shown))
            self._echoes.extend(completion for completion in fresh if completion.tag in self._twice)
            self._twice.difference_update(completion.tag for completion in fresh)
            if self._echoes:
                self._tags.doorbell.ring()
            return shown + fresh

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        self._stop.set()
        self._ticker.join(5.0)
        with self._lock:
            self.inner.close()
            self.abandoned = self.inner.abandoned
            if not self._ready.closed:
                self._ready.close()
                self._tags.close()
            self._jobs.clear()

    def fileno(self) -> int:
        self._check_process()
        return self._ready.fileno()

    def counters(self) -> dict[str, int]:
        """Those of the inner transport."""
        inner = getattr(self.inner, "counters", None)
        return dict(inner()) if inner is not None else {}

    def _start(
        self,
        tag: int,
        operation: Operation,
        peer: PeerId,
        start: Callable[[int], None],
        plan: CopyPlan | None = None,
        halves: Sequence[Callable[[int], None]] = (),
    ) -> None:
        self._check()
        with self._lock:
            self._tags.open(tag)
            rule = self.script.match(operation)
            job = _Job(tag, operation, peer, self._steps(tag, rule, start, plan, halves))
            self._jobs[tag] = job
            self._record(operation, job)
            try:
                self._step(job, None, first=True)
            except LocalProtocolError:
                # The inner transport does not take it: nothing was posted, so the tag is free again.
                del self._jobs[tag]
                self._tags.withdraw(tag)
                raise

    def _steps(
        self,
        tag: int,
        rule: Rule | None,
        start: Callable[[int], None],
        plan: CopyPlan | None,
        halves: Sequence[Callable[[int], None]],
    ) -> _Steps:
        """One operation from its call to its outcome, with the fault where the rule wants it."""
        at = None if rule is None else rule.strikes
        parts = halves if at == "middle" and halves else [start]
        if rule is not None and at == "before" and (outcome := (yield from self._strike(tag, rule, plan))):
            return outcome
        for index, part in enumerate(parts):
            completion = yield _Inner(part)
            if completion.status is not Status.DONE:
                return completion.status, completion.detail
            due = at == "after" or (at == "middle" and index == 0)
            if rule is not None and due and (outcome := (yield from self._strike(tag, rule, plan))):
                return outcome
        return Status.DONE, ""

    def _strike(
        self, tag: int, rule: Rule, plan: CopyPlan | None
    ) -> Generator[_Inner | _Parked, Completion, _Outcome | None]:
        job = self._jobs[tag]
        if rule.action == "kill":
            self._record("killed", job, target=rule.pid or os.getpid())
            os.kill(rule.pid or os.getpid(), signal.SIGKILL)
        elif rule.action == "fail":
            self._record("failed", job, status=rule.status)
            return rule.status, "injected fault"
        elif rule.action == "duplicate":
            self._twice.add(tag)
            self._record("duplicated", job)
        elif rule.action == "corrupt":
            if plan is not None and plan.num_bytes:
                self._flip(plan)
                self._record("corrupted", job)
        elif rule.action == "delay":
            self._record("delayed", job, seconds=rule.seconds)
            yield _Parked(until=time.monotonic() + rule.seconds)
        elif rule.action == "hold":
            self._record("held", job, at=rule.at)
            yield _Parked(rule=rule)
            self._record("released", job)
        else:
            self._record("dropped", job, at=rule.at)
            yield _Parked()
        return None

    def _step(self, job: _Job, value: Completion | None, *, first: bool = False) -> None:
        """Run a job up to its next wait; ``value`` is what it waited for. Only the ``first`` step has a caller to tell
        about a refusal by raising."""
        job.parked = None
        try:
            wait = next(job.steps) if value is None else job.steps.send(value)
        except StopIteration as end:
            self._finish(job, *end.value)
            return
        if isinstance(wait, _Parked):
            job.parked = wait
            return
        tag, self._next_inner_tag = self._next_inner_tag, self._next_inner_tag + 1
        job.inner_tag = tag
        self._by_inner_tag[tag] = job
        try:
            wait.start(tag)
        except LocalProtocolError as error:
            del self._by_inner_tag[tag]
            if first:
                raise
            self._finish(job, Status.ERROR, str(error))

    def _on_inner(self, completion: Completion) -> None:
        job = self._by_inner_tag.pop(completion.tag, None)
        if job is None:
            return
        job.inner_tag = None
        if job.ending:
            status = Status.CANCELLED if completion.status is Status.DONE else completion.status
            self._finish(job, status, completion.detail)
        else:
            self._step(job, completion)

    def _end(self, which: Callable[[_Job], bool], *, tell_inner: bool = True) -> None:
        for job in [job for job in self._jobs.values() if which(job)]:
            if job.inner_tag is None:
                self._finish(job, Status.CANCELLED, "ended while parked by a fault")
            elif job.operation == "post_read":
                job.ending = True
                if tell_inner:
                    self.inner.cancel(job.inner_tag)

    def _finish(self, job: _Job, status: Status, detail: str) -> None:
        job.steps.close()
        del self._jobs[job.tag]
        self._record("completed", job, status=status)
        self._tags.finish(job.tag, status, detail)

    def _tick(self) -> None:
        while not self._stop.wait(TICK_S):
            with self._lock:
                self.script.refresh()
                rules, now = self.script.rules, time.monotonic()
                for job in list(self._jobs.values()):
                    parked = job.parked
                    if parked is None:
                        continue
                    gone = parked.rule is not None and parked.rule not in rules
                    if gone or (parked.until is not None and now >= parked.until):
                        self._step(job, None)

    def _flip(self, plan: CopyPlan) -> None:
        pattern = plan.patterns[0]
        ref = order_grids(self._regions)[pattern.dst_grid]
        at = ref.grid.offset + int(plan.runs[0, 1]) * ref.grid.block_stride + pattern.dst_offset
        self._regions[ref.region].view()[at] ^= 0xFF

    def _record(self, event: str, job: _Job, **facts: Any) -> None:
        self.script.record(event, agent=self._agent, tag=job.tag, peer=job.peer, on=job.operation, **facts)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LocalProtocolError(
                f"transport 'faulty' of agent {self._agent} belongs to process {self._pid}, not to its fork "
                f"{os.getpid()}: create an agent in the child"
            )

    def _check(self) -> None:
        self._check_process()
        if self._stop.is_set():
            raise LocalProtocolError(f"transport 'faulty' of agent {self._agent} is closed")


def halve(plan: CopyPlan) -> list[CopyPlan]:
    """A plan as two that write disjoint bytes: by pattern, else by block, else by byte (or as it is: one byte)."""
    if len(plan.patterns) > 1:
        middle = len(plan.patterns) // 2
        return [replace(plan, patterns=plan.patterns[:middle]), replace(plan, patterns=plan.patterns[middle:])]
    if plan.num_blocks > 1:
        return [replace(plan, runs=runs) for runs in _halve_runs(plan)]
    if plan.num_bytes and (whole := plan.patterns[0]).run_bytes > 1:
        size = whole.run_bytes // 2
        first, rest = (
            replace(whole, run_bytes=size),
            replace(
                whole,
                src_offset=whole.src_offset + size,
                dst_offset=whole.dst_offset + size,
                run_bytes=whole.run_bytes - size,
            ),
        )
        return [replace(plan, patterns=(first,)), replace(plan, patterns=(rest,))]
    return [plan]


def _halve_runs(plan: CopyPlan) -> Iterable[Runs]:
    if len(plan.runs) > 1:
        middle = len(plan.runs) // 2
        return plan.runs[:middle], plan.runs[middle:]
    src, dst, count = plan.runs[0].tolist()
    half = count // 2
    behind = (src + half * plan.src_step) % 2**32, (dst + half * plan.dst_step) % 2**32, count - half
    rows = [(src, dst, half)], [behind]
    return [np.array(row, np.uint32) for row in rows]
