"""How long an engine that has nothing to compute may wait for our threads."""

from __future__ import annotations

import os

import pytest

from pd_connector.vllm_plugin.worker import idle_seconds


def test_the_wait_is_longer_where_our_threads_have_only_the_engines_core() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one core only")
    one, other = sorted(allowed)[:2]
    os.sched_setaffinity(0, {one})  # of this thread
    try:
        waits = [idle_seconds(cpus) for cpus in ((one,), (other,), (one, other), ())]
    finally:
        os.sched_setaffinity(0, allowed)
    assert waits == [0.02, 0.005, 0.005, 0.005]
