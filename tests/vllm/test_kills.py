"""Processes that die while D reads, and P that is told to end. In the order that restarts the fewest of them."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
from collections.abc import Callable

import pytest
from later import Later
from serving import LEASE_SECONDS, Cluster, Gauge, ask, engine_core, error_of, prefill, prompt_of, same, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_killed_decode_instance_frees_the_prefill_side_within_the_lease(cluster: Cluster) -> None:
    prompt = prompt_of(900, seed=200)
    ticket = prefill(cluster.p, prompt)
    with cluster.holding("D") as wait:
        answer = Later(cluster.d, prompt, 6, ticket)
        wait()
        assert cluster.p.metrics()["vllm:kv_cache_usage_perc"] != 0
        cluster.d.signal(signal.SIGKILL)
        cluster.check_free(cluster.p, seconds=LEASE_SECONDS + 3)
    with pytest.raises(OSError):
        answer.result()
    cluster.ensure()
    again = prompt_of(300, seed=201)
    same(ask(cluster.d, again, 6, prefill(cluster.p, again)), cluster.plain(again, 6))


def group(cluster: Cluster) -> None:
    cluster.p.signal(signal.SIGKILL)


def core(cluster: Cluster) -> None:
    os.kill(engine_core(cluster.p), signal.SIGKILL)


@pytest.mark.parametrize("kill", [group, pytest.param(core, marks=pytest.mark.slow)])
def test_killed_prefill_instance(cluster: Cluster, kill: Callable[[Cluster], None]) -> None:
    """Both decode instances read when P dies: D recomputes, F says so; both serve on, with and without a new P.

    Afterwards P is started at its old address: new tickets are read without a restart of D, old ones are refused."""
    name = kill.__name__
    prompts = [prompt_of(900, f"{name} {seed}") for seed in range(2)]
    plain = cluster.plain(prompts[0], 8)
    tickets = [prefill(cluster.p, prompt) for prompt in prompts]
    unread = prompt_of(500, f"{name} 212")
    stale = prefill(cluster.p, unread)
    d, f = Gauge(cluster.d), Gauge(cluster.f)
    with cluster.holding("D") as wait_d, cluster.holding("F") as wait_f:
        right, clean = (Later(s, p, 8, t) for s, p, t in zip((cluster.d, cluster.f), prompts, tickets, strict=True))
        wait_d()
        wait_f()
        kill(cluster)
        same(right.result(), plain)
        with pytest.raises(urllib.error.HTTPError) as failure:
            clean.result()
    assert failure.value.code == 500
    assert error_of(failure.value)
    d.wait(5, transfers_failed=1, tokens_recomputed=899)
    f.wait(5, transfers_failed=1)
    cluster.check_free(cluster.d, cluster.f)
    alone = prompt_of(200, f"{name} 213")
    same(ask(cluster.d, alone, 6), cluster.plain(alone, 6))

    assert cluster.p.process is not None
    cluster.p.process.wait(60)
    cluster.ensure()
    again = prompt_of(600, f"{name} 214")
    before = Gauge(cluster.d)
    same(ask(cluster.d, again, 6, prefill(cluster.p, again)), cluster.plain(again, 6))
    before.wait(5, transfers_done=1, transfers_failed=0)
    asked = time.monotonic()
    same(ask(cluster.d, unread, 6, stale), cluster.plain(unread, 6))
    assert time.monotonic() - asked < 10, "an old ticket is refused, not waited for"
    before.wait(5, transfers_done=1, tokens_recomputed=499)
    newer = prompt_of(600, f"{name} 215")
    same(ask(cluster.d, newer, 6, prefill(cluster.p, newer)), cluster.plain(newer, 6))
    before.wait(5, transfers_done=2)


def test_sigterm_lets_unread_tickets_be_read(cluster: Cluster) -> None:
    """vLLM 0.32 kills its engine at once on SIGTERM unless --shutdown-timeout gives it time. With it the engine goes on
    until no request is left, and one whose blocks are leased counts: so D can read, and P ends when it has."""
    prompt = prompt_of(900, seed=220)
    ticket = prefill(cluster.p, prompt)
    plain = cluster.plain(prompt, 6)
    assert cluster.p.process is not None
    d = Gauge(cluster.d)
    with cluster.holding("D", "before") as wait:
        answer = Later(cluster.d, prompt, 6, ticket)
        wait()
        os.kill(cluster.p.process.pid, signal.SIGTERM)
        time.sleep(1)
        assert cluster.p.process.poll() is None
    same(answer.result(), plain)
    d.wait(5, transfers_done=1, transfers_failed=0)
    until(lambda: cluster.p.process is not None and cluster.p.process.poll() is not None, 15)
