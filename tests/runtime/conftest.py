"""What the tests between real processes share."""

from __future__ import annotations

import os

import pytest

EMULATED = ("build/ascend", "build/cuda")


@pytest.fixture(autouse=True)
def without_emulated_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the emulated ones, in the same run, put them in sight of every process."""
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(path for path in paths if not path.endswith(EMULATED)))
