"""How long an engine that has nothing to compute may wait for our threads."""

from __future__ import annotations

import pytest

from pd_connector.vllm_plugin.worker import idle_seconds


@pytest.mark.parametrize(
    ("engine", "ours", "seconds"),
    [
        ({3}, {3}, 0.02),  # pinned together, or a machine of one core
        ({3}, {4}, 0.005),
        ({3}, {3, 4}, 0.005),
        ({3, 4}, {3}, 0.005),
        ({3, 4}, {3, 4}, 0.005),  # nothing is pinned
    ],
)
def test_the_wait_is_longer_where_our_threads_have_only_the_engines_core(
    engine: set[int], ours: set[int], seconds: float
) -> None:
    assert idle_seconds(engine, ours) == seconds
