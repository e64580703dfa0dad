"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pd_connector.memory import native

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_custom_engine() -> None:
    script = EXAMPLES / "custom_engine.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    # 3 blocks x 4 layers x (K and V) x 16 tokens x 128 channels x 2 bytes
    transport = "shm" if native() else "zmq"
    assert f"decode: 40 tokens, 98304 bytes over {transport}, all equal" in done.stdout
    assert "prefill: blocks [11, 3, 42] are free again" in done.stdout
    assert done.stderr == ""


def test_unlike_instances() -> None:
    script = EXAMPLES / "unlike_instances.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    # 5 blocks of 16 tokens x 4 layers x 4 heads x (K and V) x 64 channels x 2 bytes
    assert "70 tokens of 4 heads from 2 ranks, 327680 bytes, all equal" in done.stdout
    assert done.stderr == ""


def test_streamed() -> None:
    script = EXAMPLES / "streamed.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    # 6 blocks x 4 layers x 16 tokens x 128 channels x 2 bytes
    assert "decode: 98304 bytes" in done.stdout
    assert "decode: the first 16 tokens may be used" in done.stdout, "before the last one was computed"
    assert "every block is where it belongs" in done.stdout
    assert done.stderr == ""
