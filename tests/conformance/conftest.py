"""An owner whose memory is staged, and readers that speak to it frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from raw_reader import SLOTS, Raw

from pd_connector.testing.owner_process import LocalOwner
from pd_connector.testing.pair import CAPABILITY, LEASE, SEED
from pd_connector.transport.staged import StagedZmq


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    each: list[Any] = []
    yield each
    for one in reversed(each):
        one.close()


@pytest.fixture
def owner(closing: list[Any]) -> LocalOwner:
    made = LocalOwner(StagedZmq("owner", {"slots": SLOTS}), "mixed", SEED)
    closing.append(made)
    made.grant(LEASE, CAPABILITY, {0: range(48)})
    return made


@pytest.fixture
def raw(owner: LocalOwner, closing: list[Any]) -> Callable[[], Raw]:
    def make() -> Raw:
        made = Raw(owner)
        closing.append(made)
        return made

    return make
