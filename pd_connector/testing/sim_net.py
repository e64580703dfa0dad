"""The simulated side channel: frames between addresses, and everything that can happen to them on the way."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.events import Disconnected, Received
from pd_connector.protocol.messages import decode
from pd_connector.testing.sim_script import Weather

if TYPE_CHECKING:
    from pd_connector.testing.sim_node import Node
    from pd_connector.testing.sim_world import World


class Network:
    def __init__(self, world: World) -> None:
        self._world = world
        self._links: dict[tuple[str, str], random.Random] = {}
        self._arrived: dict[tuple[str, str], float] = {}
        self._callers: dict[str, tuple[Node, int]] = {}
        self._walls: dict[tuple[int, int], float] = {}
        self._connections = 0
        self.weather: Weather | None = None

    # --- faults -------------------------------------------------------------------------------------------------------

    def wall(self, a: int, b: int, until: float) -> None:
        """Nothing gets from instance a to instance b until then."""
        self._walls[a, b] = max(until, self._walls.get((a, b), 0.0))

    def blocked_until(self, a: int, b: int) -> float:
        """0 when the way from a to b is free."""
        until = self._walls.get((a, b), 0.0)
        return until if until > self._world.now else 0.0

    def heal(self) -> None:
        self._walls.clear()
        self.weather = None

    def cut(self, node: Node, address: str) -> None:
        """The connection that a node dialled breaks; it notices."""
        if node.dialled.pop(address, None) is not None:
            self._world.count("connections cut")
            node.feed(Disconnected(address, "the simulated connection broke"))

    # --- frames -------------------------------------------------------------------------------------------------------

    def send(self, node: Node, route: str, frame: bytes) -> None:
        if route.startswith("<"):
            caller, connection = self._callers[route]
            self._transmit(node, caller.address, (node.address, caller, connection), frame)
            return
        if route not in node.dialled:
            self._connections += 1
            node.dialled[route] = self._connections
        name = f"<{node.name}/{node.boot}.{node.dialled[route]}"
        self._callers[name] = (node, node.dialled[route])
        self._transmit(node, route, (name, None, 0), frame)

    def _transmit(self, node: Node, to: str, envelope: tuple[str, Node | None, int], frame: bytes) -> None:
        world, link = self._world, (node.address, to)
        rng = self._links.get(link)
        if rng is None:
            rng = self._links[link] = random.Random(f"{world.script.seed}/net/{link}")
        # Always the same number of draws per frame, so that one fate does not decide the next.
        lost, again, lag, more, junk = rng.random(), rng.random(), rng.random(), rng.random(), rng.random()
        arrival = world.now + world.script.rules.latency * (0.5 + lag)
        weather, target = self.weather, world.hosts.get(to)
        until = self.blocked_until(node.instance, target.instance) if target else 0.0
        if until:
            world.count("frames walled off")
            if not world.script.rules.hold_partitioned:
                return
            arrival += until - world.now
        if weather is not None:
            if lost < weather.drop:
                world.count("frames dropped")
                return
            arrival += weather.late * more**3
            if again < weather.repeat:
                world.count("frames repeated")
                world.at(arrival + 0.5 * more, self._arrive, to, envelope, frame)
            if junk < weather.garbage:
                self._garbage(to, envelope, frame, rng, arrival)
        if world.script.rules.in_order:
            arrival = self._arrived[link] = max(arrival, self._arrived.get(link, 0.0))
        world.at(arrival, self._arrive, to, envelope, frame)

    def _garbage(
        self, to: str, envelope: tuple[str, Node | None, int], frame: bytes, rng: random.Random, arrival: float
    ) -> None:
        """Deliver a damaged copy as well, unless it still reads as a message: no protocol survives well-formed lies."""
        body = bytearray(frame[: rng.randrange(len(frame))] if rng.random() < 0.5 else frame)
        for _ in range(rng.randrange(4)):
            if body:
                body[rng.randrange(len(body))] = rng.randrange(256)
        try:
            decode(bytes(body))
        except RemoteProtocolError:
            self._world.count("garbage frames")
            self._world.at(arrival, self._arrive, to, envelope, bytes(body))

    def _arrive(self, to: str, envelope: tuple[str, Node | None, int], frame: bytes) -> None:
        route, caller, connection = envelope
        target = self._world.hosts.get(to)
        rules = self._world.script.rules
        if target is None:
            return
        if caller is not None:
            if target is not caller:
                if not rules.reuse_routes:
                    return
                self._world.count("answers to a dead caller")
            elif target.dialled.get(route) != connection:
                if not rules.strays:
                    return
                self._world.count("stray answers")
        target.feed(Received(route, frame))
