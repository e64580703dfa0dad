"""``pdc doctor ADDRESS``: who answers there, and how its memory can be read from here."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Iterable

import numpy as np

from pd_connector.config import Config
from pd_connector.doctor.greeting import Greeting, Met, meet, parse_address, without_key
from pd_connector.doctor.link import BLOCKS, Target
from pd_connector.doctor.reach import Surveyor, beside, verdict
from pd_connector.doctor.report import Report, Row, State
from pd_connector.doctor.server import MODEL, lease_ticket
from pd_connector.errors import PDError
from pd_connector.layout import KVLayout
from pd_connector.protocol.messages import VERSION
from pd_connector.runtime.agent import Agent

_PULL_S = 30.0
_READER = "pdc-doctor"
"""One name for all: an owner of test memory remembers the names of its readers."""


def examine(config: Config, address: str, *, measure: bool = True) -> Report:
    """Greet the agent at ``address`` and try every transport to the memory it has or speaks for. ``measure``: read test
    memory too, if it has some. Raises ConfigError, PeerLost, RemoteProtocolError, TransportUnavailable."""
    address, ours = parse_address(address), beside(config)
    met = asyncio.run(meet(ours, address))
    report = Report(_introduction(met, config))
    owners = _owners(met)
    report.rows += [Row(f"rank {rank}", State.OK, layout_words(owner.welcome.layout)) for rank, owner in owners]
    report.rows += _lost_ranks(met)
    if not owners:
        return report
    doctor = any(owner.welcome.model == MODEL for _, owner in owners)
    target = Target() if doctor and measure else None
    with contextlib.closing(Surveyor(ours, target)) as surveyor:
        for _, owner in owners:
            rows = surveyor.survey(owner.welcome, owner.address)
            report.rows.append(verdict(f"memory of {owner.welcome.agent}", rows))
            report.transports += rows
    if target is not None:
        report.rows.append(asyncio.run(_hand_over(ours, met.speaker, target)))
    elif measure:
        report.rows.append(Row("speed", State.OK, "not measured: run `pdc doctor --serve` there and give its address"))
    return report


def _owners(met: Met) -> list[tuple[int, Greeting]]:
    """Agents with memory, by rank."""
    answered = [(rank, found) for rank, found in met.ranks.items() if isinstance(found, Greeting)]
    if not met.ranks and met.speaker.welcome.transports:
        answered = [(0, met.speaker)]
    return answered


def _introduction(met: Met, config: Config) -> list[Row]:
    welcome = met.speaker.welcome
    model = f"model {welcome.model!r}" if welcome.model else "no model named"
    words = f"{welcome.agent} at {without_key(met.speaker.address)}, {model}, protocol version {welcome.version}"
    rows = [Row("agent", State.OK, words)]
    if welcome.refused or welcome.version != VERSION:
        words = welcome.refused or f"it speaks version {welcome.version}, we {VERSION}"
        rows.append(Row("compatible", State.FAIL, words, "install the same version of pd_connector on both sides"))
    if config.model and welcome.model and welcome.model not in (config.model, MODEL):
        words = f"ours {config.model!r}, theirs {welcome.model!r}"
        rows.append(Row("model", State.FAIL, words, "serve the same model; set `model` to one text where it is"))
    answers = [met.speaker, *(found for found in met.ranks.values() if isinstance(found, Greeting))]
    rows.append(Row("round trip", State.OK, _round_trips(trip for found in answers for trip in found.round_trips)))
    if not met.ranks and not welcome.transports:
        rows.append(Row("memory", State.OK, "none: a router, or an engine that has not registered any yet"))
    return rows


def _round_trips(seconds: Iterable[float]) -> str:
    trips = [1e6 * each for each in seconds]
    spread = f"median {statistics.median(trips):.0f} us ({min(trips):.0f} to {max(trips):.0f})"
    return f"{spread} over {len(trips)} HELLOs on the side channel"


def _lost_ranks(met: Met) -> list[Row]:
    remedy = "look at that worker's log; a host that peers cannot reach is mended by `host` and `advertise` there"
    rows = []
    for rank, found in met.ranks.items():
        if isinstance(found, PDError):
            rows.append(Row(f"rank {rank}", State.FAIL, str(found), remedy))
    if met.passed_over:
        words = f"{met.passed_over} more are named and were not greeted, only the first ones within half a minute are"
        rows.append(Row("other ranks", State.WARN, words, "give the doctor a rank's own address"))
    return rows


def layout_words(layout: KVLayout | None) -> str:
    """A layout in one line."""
    if layout is None:
        return "it does not say how its memory is laid out"
    groups = []
    for group, shape in enumerate(layout.groups):
        heads = f", {shape.heads} of {shape.total_heads} KV heads" if shape.total_heads > 1 else ""
        tokens = "1 token" if shape.block_tokens == 1 else f"{shape.block_tokens} tokens"
        size = f"{layout.block_bytes(group) / 1024:g} KiB per block of {tokens}"
        groups.append(f"{len(shape.layers)} layers ({shape.kind}){heads}, {shape.dtype}, {size}")
    rank = f"rank {layout.rank} of {layout.ranks}: " if layout.ranks > 1 else ""
    return f"{rank}{'; '.join(groups)}; {layout.platform}; fingerprint {layout.fingerprint()[:12]}"


async def _hand_over(config: Config, speaker: Greeting, target: Target) -> Row:
    """The whole path, as an instance takes it: greet, open, read, and ask whether the lease held."""
    cache = target.cache
    cache.poison()
    expected = type(cache)(cache.chunk_bytes, cache.blocks, pooled=False, huge=False)
    expected.fill()
    ticket = lease_ticket(speaker.address, speaker.welcome.src)
    try:
        async with Agent(config, name=_READER) as agent:
            agent.register([cache.region])
            stats = await agent.pull(ticket, list(range(2 * BLOCKS)), timeout=_PULL_S)
    except PDError as error:
        return Row("hand-over", State.FAIL, str(error), "the rows above say which part of the path does not work")
    if not np.array_equal(cache.memory, expected.memory):
        return Row("hand-over", State.FAIL, f"wrong bytes over {stats.transport}", "do not use it, and report it")
    times = ", ".join(f"{name} {1e3 * getattr(stats, name):.1f} ms" for name in ("connect", "wire", "commit"))
    words = f"{stats.bytes / 2**20:.0f} MiB pulled over {stats.transport} and confirmed ({times}); every byte is right"
    return Row("hand-over", State.OK, words)
