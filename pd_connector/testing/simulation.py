"""Seeded simulation of the protocol: ``python -m pd_connector.testing.simulation`` (``make sim``).

Every seed is one world: two to six real protocol cores, a network that delays, drops, repeats, reorders and partitions
frames, processes that freeze, die and come back at the same address, engines that take blocks back whenever they like
and write over them at once, reads that are torn over many steps. The simulator keeps its own truth (sim_truth) of which
bytes lie where and who held them, and breaks off with a Violation when

1. bytes are confirmed that the owner's engine did not hold for that lease until the last of them was read,
2. a read writes into a destination whose transfer was reported as ended,
3. anything ends twice, never, or leaves something behind: a lease, a timer, a parked request, a quarantined block,
4. a pull fails although nothing was wrong (calm worlds).

A violation is shrunk to the operations that are needed for it and printed with the trace of that shorter run. With a
planted fault (sim_plants) the run must fail: that is how the simulation shows that it would notice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pd_connector.errors import ConfigError
from pd_connector.testing.sim_plants import PLANTS, planted
from pd_connector.testing.sim_script import Script, write_script
from pd_connector.testing.sim_shrink import broken, shrink
from pd_connector.testing.sim_truth import Violation
from pd_connector.testing.sim_world import World

_CHUNK = 20
_SHRINK_SECONDS = 20.0
_TRACE_LINES = 400
_NOT_FAULTS = {"pulls", "calm transfers", "transfers done", "transfers failed", "transfers aborted"}


@dataclass(slots=True)
class Totals:
    """What a number of seeds came to. ``failure`` is the first seed that broke a promise, and how."""

    seeds: int = 0
    events: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failure: tuple[int, str, str] | None = None

    def add(self, other: Totals) -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.counts.update(other.counts)
        if other.failure is not None and (self.failure is None or other.failure < self.failure):
            self.failure = other.failure

    def __str__(self) -> str:
        done, failed, aborted = (self.counts[f"transfers {outcome}"] for outcome in ("done", "failed", "aborted"))
        faults = sum(count for name, count in self.counts.items() if name not in _NOT_FAULTS)
        return (
            f"{self.seeds} seeds, {self.events} events, {faults} faults injected; transfers among faults: {done} done, "
            f"{failed} failed, {aborted} aborted; without faults: {self.counts['calm transfers']} done; "
            f"{'1 violation' if self.failure else 'no violation'}"
        )


def simulate(seed: int) -> Totals:
    """Run one world to its end."""
    world = World(write_script(seed))
    totals = Totals(seeds=1)
    try:
        world.run()
    except Violation as violation:
        totals.failure = (seed, violation.kind, str(violation))
    totals.events, totals.counts = world.events, world.counts
    return totals


def simulate_chunk(task: tuple[range, str]) -> Totals:
    """Run some seeds under a planted fault (or none); stops at the first violation."""
    seeds, plant = task
    totals = Totals()
    with planted(plant):
        for seed in seeds:
            totals.add(simulate(seed))
            if totals.failure is not None:
                break
    return totals


def simulate_all(seeds: range, plant: str = "", processes: int | None = None) -> Iterator[Totals]:
    """Running totals over all seeds, on every core; ends early, after a violation."""
    tasks = [(seeds[start : start + _CHUNK], plant) for start in range(0, len(seeds), _CHUNK)]
    totals = Totals()
    if len(tasks) == 1:
        totals.add(simulate_chunk(tasks[0]))
        yield totals
        return
    # Spawned, not forked: a parent may have threads, and the planted fault belongs to the children alone.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes or len(os.sched_getaffinity(0))) as pool:
        for chunk in pool.imap(simulate_chunk, tasks):
            totals.add(chunk)
            yield totals
            if totals.failure is not None:
                return


def explain(seed: int, kind: str, seconds: float = _SHRINK_SECONDS) -> tuple[Script, str, list[str]]:
    """A shortened script of a seed that breaks a promise, how it does, and the trace of its run."""
    script = shrink(write_script(seed), kind, seconds)
    trace: list[str] = []
    violation = broken(script, trace)
    assert violation is not None, "a shrunk script fails by construction"
    return script, str(violation), trace


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pd_connector.testing.simulation", description="Seeded protocol simulation.")
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds, from 0 on (default 1000)")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--plant", default="", help="run with a planted fault; 'list' names them")
    options = parser.parse_args(arguments)
    if options.plant == "list":
        print("\n".join(PLANTS))
        return 0
    try:
        planted(options.plant)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.seeds < 1:
        print("--seeds must be at least 1", file=sys.stderr)
        return 2
    seeds = range(options.seeds) if options.seed is None else range(options.seed, options.seed + 1)
    totals = _run_with_progress(seeds, options.plant)
    if totals.failure is not None:
        with planted(options.plant):
            _report(*totals.failure, options.plant)
    print(totals, flush=True)
    return 0 if totals.failure is None else 1


def _run_with_progress(seeds: range, plant: str) -> Totals:
    totals, shown, started = Totals(), 0.0, time.monotonic()
    live = sys.stderr.isatty()
    for totals in simulate_all(seeds, plant):
        elapsed = time.monotonic() - started
        if live or elapsed - shown > 10:
            shown = elapsed
            print(f"{totals.seeds}/{len(seeds)} seeds, {elapsed:.0f} s", end="\r" if live else "\n", file=sys.stderr)
    if live:
        print(file=sys.stderr)
    return totals


def _report(seed: int, kind: str, words: str, plant: str) -> None:
    print(f"seed {seed} breaks a promise: {words}")
    script, words, trace = explain(seed, kind)
    print(f"\nshrunk to {len(script.ops)} operations: {words}\n{script.rules}")
    for op in script.ops:
        print(f"  {op}")
    print("\ntrace:")
    if len(trace) > _TRACE_LINES:
        print(f"  ... {len(trace) - _TRACE_LINES} lines before")
    print("\n".join(f"  {line}" for line in trace[-_TRACE_LINES:]))
    print(f"\nagain: make sim SEED={seed}" + (f" PLANT={plant}" if plant else ""))


if __name__ == "__main__":
    raise SystemExit(main())
