"""`pdc bench transfer` with real processes, small: what it prints, that it notices wrong bytes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pd_connector.bench.case import Case
from pd_connector.bench.transfer import measure, pair
from pd_connector.bench.work import Cache, Work
from pd_connector.errors import TransferFailed
from pd_connector.memory import native
from pd_connector.transport.native import choose_lanes, lanes_here

FIELDS = {
    "transport",
    "scope",
    "memory",
    "chunk_bytes",
    "chunks",
    "bytes",
    "threads",
    "gbps_median",
    "gbps_min",
    "gbps_max",
    "limit_t1_gbps",
    "limit_t2_gbps",
    "ratio_t1",
    "ratio_t2",
    "cpu_s_per_gb",
    "verified",
}
SMALL = ["--chunk", "8192", "--mib", "2", "--rounds", "1"]
needs_native = pytest.mark.skipif(native() is None, reason="the C extension is not built")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pd_connector.cli", "bench", "transfer", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


@needs_native
def test_one_object_per_case_with_every_field_and_a_picture(tmp_path: Path) -> None:
    done = bench(*SMALL, "--json", "--plot", str(tmp_path / "speed.png"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["transport"], row["memory"]) for row in rows] == [
        ("shm", "owned"),
        ("shm", "foreign"),
        ("tcp", "owned"),
        ("zmq", "owned"),
    ]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["verified"] is True
        assert row["bytes"] == row["chunks"] * row["chunk_bytes"] == 4 * 56 * 8192
        assert 0 < row["gbps_min"] <= row["gbps_median"] <= row["gbps_max"]
        assert row["ratio_t1"] == pytest.approx(row["gbps_median"] / row["limit_t1_gbps"], rel=0.1)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "threads 0 of a benchmark: at least 1"),
        (["--chunk", "12"], "chunk_bytes 12: give a multiple of 8"),
        (["--transport", "zmp"], "did you mean 'zmq'?"),
        (["--transport", "inproc"], "it does not leave a process"),
        (["--plot", "/nowhere/x.png"], "/nowhere/x.png cannot be written"),
        (["--plot", "/tmp"], "/tmp cannot be written: name a .png"),
        (["--mib", "0"], "num_bytes 0 of a benchmark: at least 1"),
        (["--mib", "99999999"], "MiB of memory"),
        (["--chunk", "1000000000000"], "MiB of memory"),
        (["--transport", "zmq", "nope"], "there is no transport 'nope'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_byte_is_noticed() -> None:
    with pair(Case(transport="zmq", chunk_bytes=4096, num_bytes=1 << 20)) as both:
        both.read()  # the control
        work = both._work
        work.plan()  # the destination is poisoned, and nothing is read
        with pytest.raises(TransferFailed, match="wrong bytes"):
            work.check()


def test_a_byte_outside_of_the_read_is_noticed() -> None:
    mine = Cache(64, 4, pooled=False, huge=False)
    work = Work(mine)
    source, target = work.draw()
    mine.by_block()[:, target] = work._expected[:, source]
    work.check()  # the control
    other = next(block for block in range(8) if block not in target)
    mine.by_block()[3, other, 5] ^= 1
    with pytest.raises(TransferFailed, match="outside"):
        work.check()


def test_what_runs_beside_gets_a_ratio() -> None:
    row = measure(Case(transport="zmq", chunk_bytes=4096, num_bytes=1 << 20, rounds=1), lambda case: {"snail": 0.001})
    assert row["limit_snail_gbps"] == 0.001
    assert row["ratio_snail"] == pytest.approx(row["gbps_median"] / 0.001, rel=0.01)


@pytest.mark.parametrize(
    ("figures", "lanes"),
    [
        ([(1, 2.9), (2, 5.6), (4, 5.7)], 2),
        ([(1, 4.0), (2, 3.9), (4, 4.0)], 2),  # one is never enough
        ([(1, 4.3), (2, 2.6)], 2),  # also where it was the fastest by far
        ([(1, 2.0), (2, 3.9), (4, 7.0), (8, 7.1)], 4),
        ([(1, 0.0), (2, 0.0), (4, 0.0)], 2),  # the loopback could not be tried
    ],
)
def test_fewest_lanes_near_the_best(figures: list[tuple[int, float]], lanes: int) -> None:
    assert choose_lanes(figures) == lanes


@needs_native
def test_lanes_are_tried_once_per_process() -> None:
    assert lanes_here((0,)) == 1  # nothing to choose
    assert lanes_here((0, 1)) == 2
    found = lanes_here((0, 1, 0))  # as if there were three
    assert found == 2
    assert lanes_here((0, 1, 0)) == found
    assert lanes_here.cache_info().hits >= 1
