"""What the tests of the emulated libraries share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .device import library
from .libraries import Board

NEEDED = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("g++")), reason="NO COMPILER: the emulation is not built here"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(NEEDED)


def pytest_configure() -> None:
    if shutil.which("gcc") and shutil.which("g++"):
        library()  # before anything asks for the real ones


@pytest.fixture
def board() -> Iterator[Board]:
    found = Board()
    found.faults("")
    yield found
    found.faults("")
