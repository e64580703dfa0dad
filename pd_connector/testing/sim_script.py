"""What happens in one simulated world, generated from its seed before it runs: its rules, and a list of operations.

Every operation stands for itself and carries its own choices, so that a shrinker may remove any of them and the rest
stays what it was. Times and durations are virtual seconds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pd_connector.protocol.context import Limits


@dataclass(frozen=True, slots=True)
class Instance:
    """An engine: one agent per rank, and with ``speaker`` one more that has no memory and lists the ranks."""

    ranks: int
    speaker: bool
    packing: str = "sim"


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds in one world from start to end.

    ``one_sided``: reads never ask the owner's transport whether the lease is granted, as with RDMA or shared memory.
    ``follow``: a data connection reaches whoever lives at the peer's address now, not only the incarnation that it was
    made for. ``same_capabilities``: capabilities depend on the agent's name and the lease's number alone and repeat
    after a restart, so that only incarnations tell the old from the new. ``reuse_routes``: an answer to a caller that
    died is delivered to its successor. ``strays``: frames still arrive over a connection that was given up.
    ``hold_partitioned``: frames sent into a partition arrive when it heals, otherwise they are lost.
    """

    calm: bool
    instances: tuple[Instance, ...]
    grids: tuple[int, ...]
    """Grids (layers) per KV cache group."""
    blocks: int
    latency: float
    in_order: bool
    one_sided: bool
    follow: bool
    same_capabilities: bool
    reuse_routes: bool
    strays: bool
    hold_partitioned: bool
    piece_time: float
    chunk: int
    """Pieces (one block of one grid) that a read moves at once."""
    connect_fails: float = 0.0
    cancel_hangs: float = 0.0
    death_hangs: float = 0.0
    completion_lost: float = 0.0
    completion_repeated: float = 0.0
    wrong_bytes: float = 0.0
    """How likely a piece of an audited read arrives with other bytes; without an audit nothing could notice."""
    digest_fails: float = 0.0
    fence_time: float = 0.05
    death_noticed: float = 1.0
    """How likely somebody's control connection to a process that died breaks visibly."""
    slots: int = 0
    """Staging slots of every owner that all reads pass through; 0: they read where the blocks lie."""
    slot_hold: float = 15.0
    """Seconds until a slot that was not given back is taken back."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Read:
    """One instance reads the blocks of a hand-over. None: it does not happen."""

    reader: int
    ticket_after: float
    layerwise: bool = False
    audit: bool = False
    priority: int = 0
    timeout: float = 30.0
    keep: float | None = None
    forgo: bool = False
    abort_after: float | None = None
    again_after: float | None = None
    follow: bool = False
    """It knows the capability from the start, awaits the lease and follows it as it grows."""
    forge: str = ""
    """Which field of the ticket is falsified: incarnation, capability or epoch."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """An engine computes blocks, leases them and gives tickets away; ``resume``: preempted at ``end_after``, the
    request is computed again in other blocks and leased under the next epoch."""

    name: str
    at: float
    owner: int
    blocks: tuple[int, ...]
    """Blocks per KV cache group."""
    seconds: float
    cap: float
    grant_after: float
    reads: tuple[Read, ...]
    extend_every: float | None = None
    end_after: float | None = None
    resume: bool = False
    growth: float | None = None
    """Seconds per block of a lease that grows while it is computed; all its reads follow."""


@dataclass(frozen=True, slots=True)
class Restart:
    name: str
    at: float
    instance: int
    down: float
    graceful: bool


@dataclass(frozen=True, slots=True)
class Partition:
    name: str
    at: float
    seconds: float
    a: int
    b: int
    one_way: bool


@dataclass(frozen=True, slots=True)
class Break:
    """The control connection of a to b breaks."""

    name: str
    at: float
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """All processes of an instance are stopped (SIGSTOP) for a while; its memory stays readable from outside."""

    name: str
    at: float
    seconds: float
    instance: int


@dataclass(frozen=True, slots=True)
class Weather:
    """For a while, frames are lost, repeated, late and mixed with garbage."""

    name: str
    at: float
    seconds: float
    drop: float
    repeat: float
    late: float
    garbage: float


Op = HandOver | Restart | Partition | Break | Freeze | Weather


@dataclass(frozen=True, slots=True)
class Script:
    seed: int
    rules: Rules
    ops: tuple[Op, ...]


def write_script(seed: int) -> Script:
    rng = random.Random(f"{seed}/script")
    calm = rng.random() < 0.12
    rules = _staged(seed, _calm_rules(rng) if calm else _rules(rng))
    ops: list[Op] = []
    if not calm and rng.random() < 0.25:
        rules = _confusable(rng, rules)
        ops.extend(_reincarnation(rng, rules))
    ops.extend(_hand_over(rng, rules, f"h{n}") for n in range(rng.randint(8, 24) if not ops else rng.randint(0, 8)))
    if not calm:
        ops.extend(_faults(rng, len(rules.instances)))
    return Script(seed, rules, tuple(sorted(ops, key=lambda op: op.at)))


def simpler(op: Op) -> Iterator[Op]:
    """The same operation with one thing less, for the shrinker."""
    if not isinstance(op, HandOver):
        return
    for index, read in enumerate(op.reads):
        before, after = op.reads[:index], op.reads[index + 1 :]
        if len(op.reads) > 1:
            yield replace(op, reads=before + after)
        plain = Read(read.reader, read.ticket_after, timeout=read.timeout)
        for field_name in ("layerwise", "audit", "priority", "keep", "forgo", "abort_after", "again_after", "forge"):
            default = getattr(plain, field_name)
            if getattr(read, field_name) != default:
                yield replace(op, reads=(*before, replace(read, **{field_name: default}), *after))
    if op.extend_every is not None:
        yield replace(op, extend_every=None)
    if op.resume:
        yield replace(op, resume=False)
    elif op.end_after is not None:
        yield replace(op, end_after=None)
    for group, count in enumerate(op.blocks):
        if count > 1:
            yield replace(op, blocks=(*op.blocks[:group], count - 1, *op.blocks[group + 1 :]))


def _staged(seed: int, rules: Rules) -> Rules:
    """Some owners' memory cannot be reached over the wire. Drawn apart, so that all other worlds stay what they are."""
    rng = random.Random(f"{seed}/slots")
    if rng.random() >= 0.3:
        return rules
    if rules.calm:
        return replace(rules, slots=8)
    return replace(rules, slots=rng.choice((1, 2, 2, 4)), slot_hold=rng.choice((0.2, 2.0, 15.0)))


def _instances(rng: random.Random) -> tuple[Instance, ...]:
    if rng.random() < 0.3:
        return rng.choice(
            (
                (Instance(2, True), Instance(2, True)),
                (Instance(2, True), Instance(1, False)),
                (Instance(1, False), Instance(2, True)),
                (Instance(3, True), Instance(1, False)),
            )
        )
    count = rng.choice((2, 2, 3, 3, 4))
    plain = [Instance(1, rng.random() < 0.25) for _ in range(count)]
    while sum(one.ranks + one.speaker for one in plain) > 5:
        plain[rng.randrange(count)] = Instance(1, False)
    return tuple(plain)


def _calm_rules(rng: random.Random) -> Rules:
    return Rules(
        calm=True,
        instances=_instances(rng),
        grids=rng.choice(((2,), (3,), (2, 1))),
        blocks=64,
        latency=rng.uniform(0.0005, 0.01),
        in_order=rng.random() < 0.5,
        one_sided=rng.random() < 0.5,
        follow=False,
        same_capabilities=False,
        reuse_routes=False,
        strays=False,
        hold_partitioned=True,
        piece_time=rng.uniform(0.001, 0.02),
        chunk=rng.randint(1, 4),
        limits=Limits(max_transfers_per_peer=rng.choice((1, 2, 64)), window=rng.choice((1, 2, 3))),
    )


def _rules(rng: random.Random) -> Rules:
    instances = _instances(rng)
    if rng.random() < 0.05 and len(instances) > 2:
        instances = (replace(instances[0], packing="another"), *instances[1:])
    limits = Limits(
        max_leases=rng.choice((4, 16384, 16384, 16384)),
        max_transfers=rng.choice((4, 4096, 4096, 4096)),
        max_transfers_per_peer=rng.choice((1, 2, 64)),
        max_sessions=rng.choice((1, 2, 1024, 1024, 1024, 1024)),
        max_parked=rng.choice((1, 4, 1024, 1024)),
        max_digest_jobs=rng.choice((1, 64)),
        max_remembered=rng.choice((2, 65536, 65536)),
        remember=rng.choice((0.3, 120.0)),
        park=rng.choice((0.1, 2.0, 2.0)),
        hello=rng.choice((0.3, 2.0, 2.0)),
        retry=rng.uniform(0.1, 0.5),
        settle=rng.uniform(0.05, 0.5),
        fence=rng.uniform(0.1, 1.0),
        renew=rng.uniform(0.1, 1.0),
        window=rng.choice((1, 2, 3)),
    )
    return Rules(
        calm=False,
        instances=instances,
        grids=rng.choice(((1,), (2,), (3,), (2, 1))),
        blocks=rng.choice((16, 32, 64)),
        latency=rng.choice((0.001, 0.01, 0.05)),
        in_order=rng.random() < 0.5,
        one_sided=rng.random() < 0.5,
        follow=rng.random() < 0.5,
        same_capabilities=rng.random() < 0.6,
        reuse_routes=rng.random() < 0.5,
        strays=rng.random() < 0.5,
        hold_partitioned=rng.random() < 0.5,
        piece_time=rng.choice((0.002, 0.01, 0.05)),
        chunk=rng.randint(1, 4),
        connect_fails=rng.choice((0.0, 0.0, 0.0, 0.2)),
        cancel_hangs=rng.choice((0.0, 0.3, 0.8)),
        death_hangs=rng.choice((0.0, 0.5, 1.0)),
        completion_lost=rng.choice((0.0, 0.0, 0.0, 0.1)),
        completion_repeated=rng.choice((0.0, 0.3)),
        wrong_bytes=rng.choice((0.0, 0.0, 0.05)),
        digest_fails=rng.choice((0.0, 0.0, 0.1)),
        fence_time=rng.choice((0.01, 0.3, 2.0)),
        death_noticed=rng.choice((0.0, 0.4, 1.0)),
        limits=limits,
    )


def _hand_over(
    rng: random.Random, rules: Rules, name: str, owner: int | None = None, at: float | None = None
) -> HandOver:
    if owner is None:
        owner = rng.randrange(len(rules.instances))
    others = [index for index in range(len(rules.instances)) if index != owner]
    readers = rng.sample(others, 1 if rng.random() < 0.7 else rng.randint(1, len(others)))
    blocks = [rng.randint(1, 5) for _ in rules.grids]
    if len(blocks) > 1 and rng.random() < 0.3:
        blocks[rng.randrange(len(blocks))] = 0
    if at is None:
        at = rng.uniform(0.0, 6.0)
    grant_after = rng.uniform(0.1, 1.0) if rng.random() < 0.15 else rng.uniform(0.0, 0.02)
    if rules.calm:
        reads = tuple(_calm_read(rng, reader) for reader in readers)
        return _streamed(rng, HandOver(name, at, owner, tuple(blocks), 30.0, 60.0, grant_after, reads))
    seconds = rng.choice((0.3, 2.0, 3.0, 5.0, 5.0))
    end_after = rng.expovariate(2.0) if rng.random() < 0.15 else None
    op = HandOver(
        name,
        at,
        owner,
        tuple(blocks),
        seconds,
        seconds * rng.choice((1.0, 2.0, 4.0)),
        grant_after,
        tuple(_read(rng, reader) for reader in readers),
        extend_every=seconds / 2 if rng.random() < 0.2 else None,
        end_after=end_after,
        resume=end_after is not None and rng.random() < 0.4,
    )
    return _streamed(rng, op)


def _streamed(rng: random.Random, op: HandOver) -> HandOver:
    """Some hand-overs grow while they are computed; what their readers do otherwise stays."""
    if rng.random() < 0.7:
        return op
    reads = tuple(replace(read, follow=True, forge="", again_after=None, keep=None) for read in op.reads)
    return replace(op, reads=reads, growth=rng.choice((0.002, 0.05, 0.2)))


def _calm_read(rng: random.Random, reader: int) -> Read:
    return Read(
        reader,
        rng.uniform(0.0, 0.3),
        layerwise=rng.random() < 0.4,
        audit=rng.random() < 0.4,
        priority=rng.randint(0, 1),
        keep=rng.uniform(0.0, 2.0) if rng.random() < 0.3 else None,
    )


def _read(rng: random.Random, reader: int) -> Read:
    def now_and_then(chance: float, mean: float) -> float | None:
        return rng.expovariate(1 / mean) if rng.random() < chance else None

    return Read(
        reader,
        rng.uniform(0.0, 0.3),
        layerwise=rng.random() < 0.4,
        audit=rng.random() < 0.25,
        priority=rng.randint(0, 1),
        timeout=rng.choice((0.5, 3.0, 6.0, 6.0)),
        keep=now_and_then(0.25, 0.5),
        forgo=rng.random() < 0.08,
        abort_after=now_and_then(0.1, 0.2),
        again_after=now_and_then(0.08, 1.0),
        forge=rng.choice(("incarnation", "capability", "epoch")) if rng.random() < 0.04 else "",
    )


def _confusable(rng: random.Random, rules: Rules) -> Rules:
    """Slow reads over a transport that does not care whom it reads from, under capabilities that repeat."""
    return replace(
        rules,
        piece_time=0.05,
        chunk=rng.randint(1, 2),
        same_capabilities=rng.random() < 0.8,
        follow=rng.random() < 0.8,
        one_sided=rng.random() < 0.8,
        death_noticed=rng.choice((0.0, 0.0, 0.4)),
    )


def _reincarnation(rng: random.Random, rules: Rules) -> list[Op]:
    """An owner restarts early, between work that is still under way and new work under the same numbers."""
    owner, at, down = rng.randrange(len(rules.instances)), rng.uniform(0.3, 1.0), rng.choice((0.0, 0.0, 0.1))
    ops: list[Op] = [Restart("reborn", at, owner, down, False)]
    for n in range(rng.randint(1, 3)):
        ops.append(_hand_over(rng, rules, f"before{n}", owner, max(0.0, at - rng.uniform(0.1, 0.8))))
    for n in range(rng.randint(1, 4)):
        ops.append(_hand_over(rng, rules, f"after{n}", owner, at + down + rng.expovariate(4.0)))
    return ops


def _faults(rng: random.Random, instances: int) -> list[Op]:
    ops: list[Op] = []

    def some(most: int) -> range:
        return range(rng.choice((0, 0, *range(most + 1))))

    for n in some(3):
        graceful, down = rng.random() < 0.3, rng.choice((0.0, 0.0, 0.05, 1.0))
        at, who = rng.uniform(0.2, 6.5), rng.randrange(instances)
        ops.append(Restart(f"restart{n}", at, who, down, graceful))
    for n in some(2):
        a, b = rng.sample(range(instances), 2)
        ops.append(Partition(f"part{n}", rng.uniform(0.0, 6.0), rng.uniform(0.1, 2.0), a, b, rng.random() < 0.5))
    for n in some(2):
        a, b = rng.sample(range(instances), 2)
        ops.append(Break(f"break{n}", rng.uniform(0.0, 6.5), a, b))
    for n in some(2):
        ops.append(Freeze(f"freeze{n}", rng.uniform(0.0, 6.0), rng.uniform(0.1, 3.0), rng.randrange(instances)))
    for n in some(2):
        drop, repeat, garbage = rng.uniform(0.0, 0.4), rng.uniform(0.0, 0.4), rng.uniform(0.0, 0.2)
        late = rng.choice((0.0, 0.1, 1.0))
        ops.append(Weather(f"weather{n}", rng.uniform(0.0, 5.0), rng.uniform(0.5, 4.0), drop, repeat, late, garbage))
    return ops
