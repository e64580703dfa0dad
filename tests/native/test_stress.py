"""The C code without Python, under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("cc") is None, reason="NO C COMPILER: the C code is not tested here")
def test_stress_under_the_sanitizers() -> None:
    done = subprocess.run(["make", "-s", "native-test"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stress: all bytes right") == 4, done.stdout
    assert "WARNING" not in done.stderr, done.stderr


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("cc") is None, reason="NO C COMPILER: the C code is not tested here")
def test_mutated_messages_over_tcp() -> None:
    make = ["make", "-s", "fuzz", "MESSAGES=100000", "SEED=2"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fuzz_tcp: 100000 messages, seed 2" in done.stdout, done.stdout
    assert "fuzz_verbs: 100000 messages" in done.stdout, done.stdout
