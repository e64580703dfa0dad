"""One simulated world: a virtual clock, a queue of what happens next, the instances, and the script's operations."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from pd_connector.layout import Form, GroupLayout, KVLayout, Part
from pd_connector.protocol.context import Identity
from pd_connector.protocol.events import Disconnected, Drain
from pd_connector.protocol.messages import Endpoint
from pd_connector.testing.sim_engine import Engine, Offer
from pd_connector.testing.sim_net import Network
from pd_connector.testing.sim_node import Node
from pd_connector.testing.sim_script import Break, Freeze, HandOver, Op, Partition, Read, Restart, Script, Weather
from pd_connector.testing.sim_truth import Truth, Violation

MAX_EVENTS = 400_000
MAX_TIME = 900.0
_GAUGES_EVERY = 256


class World:
    """``trace`` collects lines (virtual time, who, what) when given."""

    def __init__(self, script: Script, trace: list[str] | None = None) -> None:
        self.script = script
        self.trace = trace
        self.now = 0.0
        self.events = 0
        self.counts: Counter[str] = Counter()
        self.truth = Truth()
        self.healed = False
        self.hosts: dict[str, Node] = {}
        """Who lives at an address now."""
        self.engines: list[Engine] = []
        self.grid_groups = [group for group, grids in enumerate(script.rules.grids) for _ in range(grids)]
        self.net = Network(self)
        self._queue: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._sequence = 0
        self._boots: Counter[int] = Counter()

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, when: float, what: Callable[..., Any], *args: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (when, self._sequence, what, args))

    def later(self, delay: float, what: Callable[..., Any], *args: Any) -> None:
        self.at(self.now + delay, what, *args)

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def say(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f}  {who:<6} {what}")

    def run(self) -> None:
        """Raises Violation; a crash of the core is one too."""
        for index in range(len(self.script.rules.instances)):
            self.engines.append(self._boot(index))
        for op in self.script.ops:
            self.at(op.at, self._happen, op)
        end = max((op.at + getattr(op, "seconds", 0.0) for op in self.script.ops), default=0.0)
        self.at(max(end, 8.0), self._heal)
        while self._queue:
            self.now, _, what, args = heapq.heappop(self._queue)
            self.events += 1
            if self.events > MAX_EVENTS or self.now > MAX_TIME:
                raise Violation("never quiet", f"{self.events} events until {self.now:.1f} s and still going on")
            if self.events % _GAUGES_EVERY == 0:
                for node in self.hosts.values():
                    node.check_gauges()
            try:
                what(*args)
            except Violation:
                raise
            except Exception as error:
                raise Violation("crash", f"{type(error).__name__}: {error}") from error
        for engine in self.engines:
            engine.check_idle()

    # --- instances ----------------------------------------------------------------------------------------------------

    def _boot(self, index: int) -> Engine:
        shape, boot = self.script.rules.instances[index], self._boots[index]
        self._boots[index] += 1
        rng = random.Random(f"{self.script.seed}/incarnation/{index}/{boot}")
        names = [f"a{index}" if shape.ranks == 1 and not shape.speaker else f"a{index}r{r}" for r in range(shape.ranks)]
        ranks = []
        for rank, name in enumerate(names):
            incarnation = rng.getrandbits(63) | 1
            identity = Identity(
                name,
                incarnation,
                "simulated",
                _layout(shape.packing, rank, shape.ranks, self.script.rules.grids),
                {"sim": f"sim://{name} {incarnation}".encode()},
            )
            ranks.append(Node(self, name, index, boot, identity, len(self.grid_groups)))
        speaker = None
        if shape.speaker:
            directory = tuple(_endpoint(node) for node in ranks)
            identity = Identity(f"a{index}s", rng.getrandbits(63) | 1, "simulated", directory=directory)
            speaker = Node(self, f"a{index}s", index, boot, identity, 0)
        engine = Engine(self, index, ranks, speaker)
        for node in engine.nodes():
            node.engine = engine
            self.hosts[node.address] = node
        return engine

    def deliver(self, read: Read, name: str, offer: Offer) -> None:
        """A ticket reaches the instance that will read; a request that finds nobody is gone."""
        engine = self.engines[read.reader]
        if engine.dead:
            self.count("tickets for the dead")
        else:
            engine.receive(read, name, offer)

    # --- operations ---------------------------------------------------------------------------------------------------

    def _happen(self, op: Op) -> None:
        self.say("world", f"{op}")
        match op:
            case HandOver():
                if not self.engines[op.owner].dead:
                    self.engines[op.owner].hand_over(op)
            case Restart():
                self._restart(op)
            case Partition():
                self.count("partitions")
                self.net.wall(op.a, op.b, self.now + op.seconds)
                if not op.one_way:
                    self.net.wall(op.b, op.a, self.now + op.seconds)
            case Break():
                for node in self.engines[op.a].nodes():
                    for target in self.engines[op.b].nodes():
                        self.net.cut(node, target.address)
            case Freeze():
                self.count("freezes")
                for node in self.engines[op.instance].nodes():
                    node.frozen_until = max(node.frozen_until, self.now + op.seconds)
            case Weather():
                self.net.weather = op
                self.later(op.seconds, self._clear, op)

    def _clear(self, op: Weather) -> None:
        if self.net.weather is op:
            self.net.weather = None

    def _heal(self) -> None:
        """No more faults from here on: whatever is still open must come to its end."""
        self.say("world", "everything is healed")
        self.healed = True
        self.net.heal()

    def _restart(self, op: Restart) -> None:
        engine = self.engines[op.instance]
        if engine.dead:
            return
        if op.graceful:
            self.count("drains")
            for node in engine.nodes():
                node.feed(Drain())
            self.later(1.0, self._stop, op, engine, 0)
        else:
            self._kill(op, engine)

    def _stop(self, op: Restart, engine: Engine, tried: int) -> None:
        """Close once everything is drained, or after some time anyway."""
        if engine.dead:
            return
        if engine.drained < len(engine.nodes()) and tried < 5:
            self.later(0.3, self._stop, op, engine, tried + 1)
            return
        engine.close()
        self.later(0.01, self._kill, op, engine)

    def _kill(self, op: Restart, engine: Engine) -> None:
        if engine.dead:
            return
        self.count("restarts")
        engine.die()
        for node in engine.nodes():
            del self.hosts[node.address]
        rng = random.Random(f"{self.script.seed}/restart/{op.name}")
        for host in list(self.hosts.values()):
            for node in engine.nodes():
                if node.address in host.dialled and rng.random() < self.script.rules.death_noticed:
                    self.later(rng.expovariate(10.0), self._notice, host, node.address)
        self.later(op.down, self._reboot, op.instance)

    def _notice(self, host: Node, address: str) -> None:
        if host.dialled.pop(address, None) is not None:
            host.feed(Disconnected(address, "the peer is gone"))

    def _reboot(self, instance: int) -> None:
        self.say("world", f"instance {instance} boots")
        self.engines[instance] = self._boot(instance)


def _layout(packing: str, rank: int, ranks: int, grids: tuple[int, ...]) -> KVLayout:
    form = Form(block_bytes=(64,), parts=(Part(name="kv", unit_bytes=64, token_stride=64, packing=packing),))
    groups = tuple(
        GroupLayout(
            kind="full",
            block_tokens=1,
            dtype="u8",
            layers=tuple(f"{group}.{layer}" for layer in range(count)),
            forms=(form,),
            form_of=(0,) * count,
        )
        for group, count in enumerate(grids)
    )
    return KVLayout(rank=rank, ranks=ranks, groups=groups)


def _endpoint(node: Node) -> Endpoint:
    identity = node.core.identity
    assert identity.layout is not None
    return Endpoint(identity.layout.rank, node.address, node.incarnation, identity.layout)
