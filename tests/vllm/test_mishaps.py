"""Wrong bytes, wrong tickets, clients that leave, a prefill instance that stops for a while: nobody dies here."""

from __future__ import annotations

import asyncio
import copy
import signal
import socket
import time
import urllib.error
from collections.abc import Iterator

import pytest
from later import Call, Later
from serving import LEASE_SECONDS, Cluster, Gauge, ask, body, error_of, prefill, prompt_of, same, until

from pd_connector.demo.instance import Instance, free_port
from pd_connector.protocol.params import from_params
from pd_connector.runtime.agent import Agent

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def leases(server: Instance) -> float:
    """As P reports by itself: it steps as long as anything is leased, and once more when it is not."""
    key = 'vllm:pdc_state{engine="0",model_name="demo",state="leases",worker="0"}'
    return server.metrics().get(key, 0.0)


# --- wrong bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False], ids=["flipped", "control"])
def test_a_flipped_byte_is_caught_and_recomputed(cluster: Cluster, flip: bool) -> None:
    prompt = prompt_of(500, seed=100 + flip)
    ticket = prefill(cluster.p, prompt)
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    if flip:
        cluster.corrupt("D")
    same(ask(cluster.d, prompt, 6, ticket), cluster.plain(prompt, 6))
    d.wait(5, transfers_failed=flip, transfers_done=not flip, tokens_recomputed=499 if flip else 0)
    assert d.since("pdc_num_failed_transfers_total") == flip
    assert (d.since("pdc_audit_digests_compared_total") > 0) is not flip
    p.wait(5, audit_mismatches=flip)


def test_a_flipped_byte_under_policy_fail_is_one_clear_error(cluster: Cluster) -> None:
    prompt = prompt_of(500, seed=102)
    ticket = prefill(cluster.p, prompt)
    cluster.corrupt("F")
    with pytest.raises(urllib.error.HTTPError) as failure:
        ask(cluster.f, prompt, 6, ticket)
    assert failure.value.code == 500
    assert error_of(failure.value)
    ticket = prefill(cluster.p, prompt)
    cluster.corrupt("F")
    events = Call(cluster.f, body(prompt, 6, ticket, stream=True)).events()
    assert "error" in events[0]
    assert not any("choices" in event for event in events)
    cluster.heal()
    ticket = prefill(cluster.p, prompt)
    same(ask(cluster.f, prompt, 6, ticket), cluster.plain(prompt, 6))


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_client_of_the_decode_instance_leaves_while_it_reads(cluster: Cluster, at: str) -> None:
    prompt = prompt_of(700, seed=110)
    ticket = prefill(cluster.p, prompt, cache_salt=at)
    d = Gauge(cluster.d)
    with cluster.holding("D", at) as wait:
        call = Call(cluster.d, body(prompt, 20, ticket, cache_salt=at))
        wait()
        until(lambda: leases(cluster.p) == 1, 5)
        call.leave()
        left = time.monotonic()
        until(lambda: not leases(cluster.p), 5)
        assert time.monotonic() - left < 2
    cluster.check_free()
    d.wait(5, transfers_aborted=1, transfers_failed=0)


def test_a_client_leaves_while_its_answer_is_decoded(cluster: Cluster) -> None:
    prompt = prompt_of(700, seed=111)
    call = Call(cluster.d, body(prompt, 2000, prefill(cluster.p, prompt), stream=True))
    assert call.first_bytes()
    call.leave()
    cluster.check_free()


def test_clients_of_the_prefill_instance_leave(cluster: Cluster) -> None:
    """In the queue, in mid-prefill, or when the ticket is on its way: nobody releases that one, so its lease runs."""
    for step in range(6):
        call = Call(cluster.p, body(prompt_of(2800, seed=150 + step), 1, {"do_remote_decode": True}))
        time.sleep(0.03 * step)
        call.leave()
    cluster.check_free(seconds=LEASE_SECONDS + 5)


def test_a_client_of_the_router_leaves_between_prefill_and_decode(cluster: Cluster) -> None:
    """D is stopped, so it has not even taken the second leg; the router gives the ticket back."""
    assert cluster.d.process is not None
    p = Gauge(cluster.p)
    cluster.d.signal(signal.SIGSTOP)
    try:
        call = Call(cluster.router, body(prompt_of(700, seed=114), 20))
        until(lambda: leases(cluster.p) == 1, 60)
        call.leave()
        left = time.monotonic()
        until(lambda: not leases(cluster.p), 5)
        assert time.monotonic() - left < 2
    finally:
        cluster.d.signal(signal.SIGCONT)
    cluster.check_free(cluster.p)
    assert p.event("leases_expired") == 0


def test_a_client_of_the_router_leaves_while_decode_reads(cluster: Cluster) -> None:
    with cluster.holding("D") as wait:
        call = Call(cluster.router, body(prompt_of(700, seed=115), 20))
        wait()
        until(lambda: leases(cluster.p) == 1, 5)
        call.leave()
        left = time.monotonic()
        until(lambda: not leases(cluster.p), 5)
        assert time.monotonic() - left < 2
    cluster.check_free()


async def test_a_ticket_that_any_agent_gives_back(cluster: Cluster) -> None:
    ticket = await asyncio.to_thread(prefill, cluster.p, prompt_of(700, seed=116))
    await asyncio.to_thread(until, lambda: leases(cluster.p) == 1, 5)
    async with Agent() as agent:
        agent.release(from_params(ticket), whole=True)
        released = time.monotonic()
        await asyncio.to_thread(until, lambda: not leases(cluster.p), 5)
        assert time.monotonic() - released < 2


# --- wrong tickets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


@pytest.mark.parametrize("case", ["capability", "incarnation", "nobody listens", "never answers"])
def test_tickets_that_lead_nowhere(cluster: Cluster, silent: int, case: str) -> None:
    prompt = prompt_of(300, seed=f"120 {case}")
    ticket = prefill(cluster.p, prompt)
    wrong = copy.deepcopy(ticket)
    match case:
        case "capability":
            wrong["pdc"]["capability"] = "ab" * 16
        case "incarnation":
            wrong["pdc"]["incarnation"] = "1234"
        case "nobody listens":
            wrong["remote_port"] = free_port()
        case "never answers":
            wrong["remote_port"] = silent
    d = Gauge(cluster.d)
    started = time.monotonic()
    same(ask(cluster.d, prompt, 6, wrong), cluster.plain(prompt, 6))
    assert time.monotonic() - started < 25
    if case == "capability":
        d.wait(5, transfers_failed=1, tokens_recomputed=299)
    else:
        d.wait(5, meetings_failed=1, transfers=0, tokens_recomputed=299)


def test_an_expired_ticket(cluster: Cluster) -> None:
    prompt = prompt_of(300, seed=121)
    ticket = prefill(cluster.p, prompt)
    p = Gauge(cluster.p)
    p.wait(LEASE_SECONDS + 5, leases_expired=1)
    d = Gauge(cluster.d)
    same(ask(cluster.d, prompt, 6, ticket), cluster.plain(prompt, 6))
    d.wait(5, tokens_recomputed=299)


# --- a prefill instance that stops ------------------------------------------------------------------------------------


def test_a_prefill_instance_stopped_beyond_the_lease(cluster: Cluster) -> None:
    """When it goes on it must know that the lease is over before it answers anybody; then others get the blocks."""
    prompt = prompt_of(900, seed=130)
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    ticket = prefill(cluster.p, prompt)
    with cluster.holding("D") as wait:
        answer = Later(cluster.d, prompt, 8, ticket)
        wait()
        until(lambda: leases(cluster.p) == 1, 5)
        cluster.p.signal(signal.SIGSTOP)
        time.sleep(LEASE_SECONDS + 1)  # the lease runs on P's clock, which nobody can hurry
        cluster.p.signal(signal.SIGCONT)
        until(lambda: not leases(cluster.p), 20)
        for seed in range(131, 135):  # all of P's cache, written over
            prefill_only(cluster, prompt_of(2000, seed))
    same(answer.result(), cluster.plain(prompt, 8))
    d.wait(5, transfers_done=0, transfers_failed=1)
    assert p.event("commits_held") == 0
    again = prompt_of(400, seed=136)
    same(ask(cluster.d, again, 6, prefill(cluster.p, again)), cluster.plain(again, 6))
    d.wait(5, transfers_done=1)


def prefill_only(cluster: Cluster, prompt: list[int]) -> None:
    cluster.p.post("/v1/completions", body(prompt, 1))
