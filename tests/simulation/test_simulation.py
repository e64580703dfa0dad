"""The simulation finds nothing in the core as it is, and every fault that is planted into it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pd_connector.testing.sim_plants import PLANTS, planted
from pd_connector.testing.sim_script import HandOver, write_script
from pd_connector.testing.sim_shrink import broken
from pd_connector.testing.sim_world import World
from pd_connector.testing.simulation import explain, simulate, simulate_all

SEEDS = 1000


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "pd_connector.testing.simulation", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.timeout(180)
def test_the_core_keeps_its_promises() -> None:
    *_, totals = simulate_all(range(300))
    assert totals.failure is None
    assert totals.seeds == 300


def test_enough_succeeds_for_a_simulation_that_proves_something() -> None:
    counts = sum((simulate(seed).counts for seed in range(60)), start=simulate(60).counts)
    ends = [counts[f"transfers {outcome}"] for outcome in ("done", "failed", "aborted")]
    assert ends[0] > 0.3 * sum(ends)
    assert counts["calm transfers"] > 0
    for fault in ("restarts", "frames dropped", "frames repeated", "partitions", "completions lost", "garbage frames"):
        assert counts[fault] > 0, fault


def test_a_seed_is_one_world() -> None:
    def trace(seed: int) -> list[str]:
        lines: list[str] = []
        World(write_script(seed), lines).run()
        return lines

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(plant: str) -> None:
    *_, totals = simulate_all(range(SEEDS), plant)
    assert totals.failure is not None


@pytest.mark.timeout(180)
def test_a_violation_is_shrunk_and_explained() -> None:
    *_, totals = simulate_all(range(SEEDS), "reuse-before-settled")
    assert totals.failure is not None
    seed, kind, _ = totals.failure
    before = write_script(seed)
    with planted("reuse-before-settled"):
        script, words, trace = explain(seed, kind, seconds=10)
        assert broken(script) is not None
    assert broken(script) is None, "without the plant the same operations are fine"
    assert words.startswith(kind)
    assert len(script.ops) < len(before.ops)
    assert any(isinstance(op, HandOver) for op in script.ops)
    assert any("PostRead" in line for line in trace)


@pytest.mark.timeout(180)
def test_the_command_says_what_it_found() -> None:
    fine = command("--seeds", "20")
    assert fine.returncode == 0
    assert "20 seeds" in fine.stdout.splitlines()[-1]
    assert "no violation" in fine.stdout.splitlines()[-1]
    wrong = command("--seeds", "20", "--plant", "end-twice")
    assert wrong.returncode == 1
    assert "ended twice" in wrong.stdout
    assert "trace:" in wrong.stdout
    assert "make sim SEED=" in wrong.stdout


def test_the_command_names_the_plants() -> None:
    assert command("--plant", "list").stdout.split() == list(PLANTS)
    unknown = command("--plant", "no-such-fault")
    assert unknown.returncode == 2
    assert len(unknown.stderr.splitlines()) == 1
    assert all(name in unknown.stderr for name in PLANTS)
