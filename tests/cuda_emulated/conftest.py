"""What the tests of the emulated driver share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_connector.memory import native

from .device import faults, library

COMPILER = shutil.which("gcc")
NEEDED = pytest.mark.skipif(not COMPILER, reason="NO COMPILER: the emulation is not built here")
EXTENSION = pytest.mark.skipif(native() is None, reason="the C extension was not built")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(NEEDED)
            item.add_marker(EXTENSION)


def pytest_configure() -> None:
    if COMPILER:
        library()  # before anything asks for the real one


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    faults("")
    yield
    faults("")
