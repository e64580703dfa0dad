"""Make a failing script short: remove operations, then parts of them, as long as the same promise stays broken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from pd_connector.testing.sim_script import Op, Script, simpler
from pd_connector.testing.sim_truth import Violation
from pd_connector.testing.sim_world import World


def broken(script: Script, trace: list[str] | None = None) -> Violation | None:
    """What goes wrong in the world of this script, if anything."""
    try:
        World(script, trace).run()
    except Violation as violation:
        return violation
    return None


def shrink(script: Script, kind: str, seconds: float) -> Script:
    """The shortest script found within ``seconds`` of real time that still breaks the same kind of promise."""
    deadline = time.monotonic() + seconds

    def still_fails(ops: list[Op]) -> bool:
        if time.monotonic() > deadline:
            return False
        violation = broken(replace(script, ops=tuple(ops)))
        return violation is not None and violation.kind == kind

    ops = _fewer(list(script.ops), still_fails)
    ops = _smaller(ops, still_fails)
    return replace(script, ops=tuple(_fewer(ops, still_fails)))


def _fewer(ops: list[Op], still_fails: Callable[[list[Op]], bool]) -> list[Op]:
    """Delta debugging: leave out ever smaller stretches until no single operation can be left out."""
    size = max(1, len(ops) // 2)
    while True:
        start, removed = 0, False
        while start < len(ops):
            rest = ops[:start] + ops[start + size :]
            if rest and still_fails(rest):
                ops, removed = rest, True
            else:
                start += size
        if size > 1:
            size //= 2
        elif not removed:
            return ops


def _smaller(ops: list[Op], still_fails: Callable[[list[Op]], bool]) -> list[Op]:
    """Take details away from the operations that are left."""
    index = 0
    while index < len(ops):
        for candidate in simpler(ops[index]):
            changed = [*ops[:index], candidate, *ops[index + 1 :]]
            if still_fails(changed):
                ops = changed
                break
        else:
            index += 1
    return ops
