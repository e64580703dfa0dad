"""Two hundred requests of every kind through the router, a quarter of them abandoned: afterwards nothing is held."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from dataclasses import dataclass
from statistics import mean

import aiohttp
import pytest
from serving import LOGPROBS, Answer, Cluster, Gauge, body, prompt_of, same

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

REQUESTS = 200
AT_ONCE = 12


@dataclass
class Plan:
    prompt: list[int]
    tokens: int
    stream: bool
    leave_at: float | None
    """When the client leaves, in lifetimes of a request as they are at that moment: at any stage."""


def plans(seed: int) -> list[Plan]:
    chance = random.Random(seed)
    leaving = set(chance.sample(range(REQUESTS), REQUESTS // 4))
    return [
        Plan(
            prompt_of(chance.randint(1, 2000), chance.randrange(2**30)),
            chance.randint(1, 24),
            chance.random() < 0.5,
            chance.random() if index in leaving else None,
        )
        for index in range(REQUESTS)
    ]


async def perform(
    client: aiohttp.ClientSession, url: str, plan: Plan, lifetimes: deque[float]
) -> list[int] | Answer | None:
    """Streamed tokens, or a whole answer; None when the client left."""
    more = {"return_token_ids": True} if plan.stream else LOGPROBS

    async def whole() -> list[int] | Answer:
        async with client.post(url, json=body(plan.prompt, plan.tokens, stream=plan.stream, **more)) as answer:
            assert answer.status == 200, (answer.status, await answer.text())
            if not plan.stream:
                return Answer.of(await answer.json())
            text = (await answer.read()).decode(errors="replace")
            events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]", text[-300:]
            choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
            return [token for choice in choices for token in choice["token_ids"] or ()]

    begun = time.monotonic()
    try:
        answer = await asyncio.wait_for(whole(), None if plan.leave_at is None else plan.leave_at * mean(lifetimes))
    except TimeoutError:
        return None
    lifetimes.append(time.monotonic() - begun)
    return answer


async def test_two_hundred_mixed_requests(cluster: Cluster) -> None:
    d, p = Gauge(cluster.d), Gauge(cluster.p)
    gate = asyncio.Semaphore(AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=300)
    all_plans = plans(seed=6)
    lifetimes = deque([0.5], maxlen=20)

    async def one(plan: Plan) -> list[int] | Answer | None:
        async with gate:
            return await perform(client, f"{cluster.router.url}/v1/completions", plan, lifetimes)

    async with aiohttp.ClientSession(timeout=timeout) as client:
        answers = await asyncio.gather(*(one(plan) for plan in all_plans))
    ended = time.monotonic()
    await asyncio.to_thread(cluster.check_free, cluster.p, cluster.d)
    assert time.monotonic() - ended < 5
    for plan, answer in zip(all_plans, answers, strict=True):
        if plan.leave_at is None:
            assert answer is not None
            assert len(answer.tokens if isinstance(answer, Answer) else answer) == plan.tokens
    whole = [(plan, answer) for plan, answer in zip(all_plans, answers, strict=True) if isinstance(answer, Answer)]
    for plan, answer in whole[:: len(whole) // 10]:
        same(answer, await asyncio.to_thread(cluster.plain, plan.prompt, plan.tokens))
    left = answers.count(None)
    assert left >= REQUESTS // 8, "too few clients left in time for this to mean anything"
    done = d.event("transfers_done")
    assert done >= 0.9 * (REQUESTS - REQUESTS // 4), "D computed prompts itself"
    # When a client leaves, P hears of it from the router, maybe before D has heard and stopped reading.
    assert d.event("transfers_failed") <= left
    assert p.event("leases_granted") >= done
    # A client may leave while P's answer is on its way: then nobody has the ticket, and the deadline ends the lease.
    assert p.event("leases_expired") <= 1
