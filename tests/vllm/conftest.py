"""One cluster for all tests here, made at the first use. Tests that kill come last; a dead server is started again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from serving import Cluster

from pd_connector.demo.model import build_model

_ORDER = (
    *("test_startup", "test_handover", "test_mishaps", "test_mixed", "test_kills", "test_parallel"),
    *("test_streamed", "test_unlike"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order that restarts the fewest servers."""
    here = Path(__file__).parent
    mine = [item for item in items if item.path.parent == here]
    rank = {name: index for index, name in enumerate(_ORDER)}
    mine.sort(key=lambda item: rank.get(item.path.stem, len(_ORDER)))
    others = [item for item in items if item.path.parent != here]
    items[:] = others + mine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), model)
    yield made
    made.stop()


@pytest.fixture
def cluster(servers: Cluster) -> Iterator[Cluster]:
    """Everything runs before a test, and nothing that still runs after it holds anything."""
    servers.ensure()
    servers.heal()
    yield servers
    servers.heal()
    alive = [s for s in (servers.p, servers.d, servers.f) if s.process is not None and s.process.poll() is None]
    if alive:
        servers.check_free(*alive, seconds=15)
