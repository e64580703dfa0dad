"""The real connector classes with a KV cache on an emulated NPU: the tests of tests/plugin once more. Not run on
hardware, and without vllm-ascend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pd_connector.memory import native

from .build import build

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(native() is None, reason="the C extension was not built")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("transport", "module"),
    [
        ("hixl", "test_handover.py"),
        ("hixl", "test_device_order.py"),
        pytest.param("hccl", "test_handover.py", marks=pytest.mark.slow),
        pytest.param("staged-tcp", "test_handover.py", marks=pytest.mark.slow),
        pytest.param("auto", "test_turns.py", marks=pytest.mark.slow),
    ],
)
def test_the_connector(transport: str, module: str) -> None:
    """Turns go through a pool of host memory, which is staged; two of their tests wrap zmq, which cannot be."""
    environment = os.environ | {"PDC_TEST_DEVICE": "npu", "PDC_TEST_TRANSPORT": transport, "PDC_TEST_PATIENCE": "3"}
    environment["LD_LIBRARY_PATH"] = f"{build()}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/plugin/{module}"]
    words += ["-k", "not is_confirmed and not hung_copy"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
