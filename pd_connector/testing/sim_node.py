"""One process of the simulation: a real protocol core, its clock, its memory, and whoever carries out its commands."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

from pd_connector.errors import LocalProtocolError, RemoteProtocolError
from pd_connector.protocol.context import Identity
from pd_connector.protocol.core import Core
from pd_connector.protocol.events import (
    Cancel,
    Command,
    Connect,
    DigestBlocks,
    Digested,
    Disconnect,
    Event,
    Fence,
    Grant,
    GrantBlocks,
    Hangup,
    Notify,
    PostRead,
    Pull,
    Received,
    RevokeBlocks,
    Send,
    Tick,
)
from pd_connector.protocol.messages import Message, decode, encode
from pd_connector.testing.sim_data import Data
from pd_connector.testing.sim_truth import Piece, Violation, Watch

if TYPE_CHECKING:
    from pd_connector.testing.sim_engine import Engine
    from pd_connector.testing.sim_world import World

_UNSAID = {"capability", "audit", "layout", "transports", "version", "model", "directory"}


class Node:
    def __init__(self, world: World, name: str, instance: int, boot: int, identity: Identity, grids: int) -> None:
        self.world = world
        self.name = name
        self.instance = instance
        self.boot = boot
        self.address = f"sim://{name}"
        self.core = Core(identity, world.script.rules.limits)
        self.rng = random.Random(f"{world.script.seed}/node/{name}/{boot}")
        self.engine: Engine
        self.data = Data(self)
        blocks = world.script.rules.blocks
        self.memory = [[world.truth.new_content() for _ in range(blocks)] for _ in range(grids)]
        self.plans: dict[int, tuple[Watch, int, tuple[Piece, ...]]] = {}
        """Which part of which pull a plan belongs to and what it reads, by the plan's identity."""
        self.dialled: dict[str, int] = {}
        self.dead = False
        self.frozen_until = 0.0
        self._skew = self.rng.uniform(0.0, 1000.0)
        self._tick_at = float("inf")
        self._called = 0.0

    @property
    def incarnation(self) -> int:
        return self.core.identity.incarnation

    def call(self, event: Event, delay: float = 0.0) -> None:
        """The engine tells its agent something; such calls arrive in the order in which they were made."""
        self._called = max(self._called, self.world.now + delay)
        self.world.at(self._called, self.feed, event)

    def call_later(self, delay: float, event: Event) -> None:
        self.world.later(delay, self.feed, event)

    def feed(self, event: Event) -> None:
        world = self.world
        if self.dead:
            return
        if self.frozen_until > world.now:
            world.at(self.frozen_until, self.feed, event)
            return
        if world.trace is not None and not isinstance(event, Tick):
            world.say(self.name, f"< {_words(event)}")
        now = world.now + self._skew
        try:
            commands = self.core.handle(event, now)
        except LocalProtocolError as error:
            self.engine.refused(self, event, error)
            commands = self.core.handle(Tick(), now)
        for command in commands:
            if world.trace is not None:
                world.say(self.name, f"> {_words(command)}")
            self._carry_out(command)
        self._schedule()

    def _schedule(self) -> None:
        deadline = self.core.next_deadline()
        if deadline is not None and deadline - self._skew < self._tick_at:
            self._tick_at = deadline - self._skew
            # A hair late rather than early: the skew costs some bits of the float.
            self.world.at(self._tick_at + 1e-9, self._tick, self._tick_at)

    def _tick(self, planned: float) -> None:
        if planned != self._tick_at:
            return  # an earlier one took its place
        if self.frozen_until > self.world.now:
            self.world.at(self.frozen_until, self._tick, planned)
            return
        self._tick_at = float("inf")
        self.feed(Tick())

    def _carry_out(self, command: Command) -> None:
        match command:
            case Send(route, message):
                self.world.net.send(self, route, encode(message))
            case Notify(note):
                self.engine.notified(self, note)
            case PostRead():
                self.data.post(command)
            case Cancel(_, tag):
                self.data.cancel(tag)
            case Fence(peer, _, tag):
                self.data.fence(peer, tag)
            case GrantBlocks():
                self.data.grant(command)
            case RevokeBlocks(number, epoch):
                self.data.revoke(number, epoch)
            case DigestBlocks():
                self.world.later(self.rng.uniform(0.0, 0.05), self._digest, command)
            case Connect():
                self.data.connect(command)
            case Disconnect(peer):
                self.data.disconnect(peer)
            case Hangup(route):
                self.dialled.pop(route, None)

    def _digest(self, command: DigestBlocks) -> None:
        if self.rng.random() < self.world.script.rules.digest_fails:
            self.world.count("digests failed")
            self.feed(Digested(command.job, None))
            return
        out = b"".join(
            hashlib.blake2b(self.memory[place.grid][block].to_bytes(8), digest_size=8).digest()
            for side in command.sides
            for place in side.places
            for block in side.blocks.tolist()
        )
        self.feed(Digested(command.job, out))

    def die(self) -> None:
        self.dead = True
        self.data.close()

    # --- at the end ---------------------------------------------------------------------------------------------------

    def check_gauges(self) -> None:
        for name, value in self.core.gauges().items():
            if value < 0:
                raise Violation("gauge", f"{self.name}: {name} is {value}")

    def check_idle(self) -> None:
        """Everything is over: nothing may be held, kept, waited for or remembered as under way."""
        core = self.core
        self.data.staging.check_idle()
        left: dict[str, object] = {name: value for name, value in core.gauges().items() if name != "peers" and value}
        reader, owner = core.reader, core.owner
        rest = {
            "timers": len(core._context.timers),
            "tags": reader._tags,
            "reader's jobs": reader._jobs,
            "fences": reader._fences,
            "unsettled peers": reader.dialer.unsettled,
            "owner's jobs": owner._jobs,
            "parked": owner._parked,
            "sessions in use": [s.address for s in reader.dialer.sessions.values() if s.waiting or s.active],
        }
        left.update({name: value for name, value in rest.items() if value})
        if left:
            raise Violation("leftovers", f"{self.name}: {left}")


def _words(what: Event | Command) -> str:
    """An event or command for the trace, without what nobody can read."""
    match what:
        case Received(route, frame):
            try:
                return f"{_message(decode(frame))} from {route}"
            except RemoteProtocolError:
                return f"garbage from {route}"
        case Send(route, message):
            return f"{_message(message)} to {route}"
        case Notify(note):
            return repr(note)
        case Pull(transfer, ticket, parts):
            return f"Pull({transfer}, {ticket!r}, {len(parts)} parts)"
        case PostRead(peer, _, number, epoch, _, _, tag):
            return f"PostRead(tag {tag}, lease {number}.{epoch} of {peer})"
        case Grant(number, epoch, _, blocks, readers, seconds):
            return f"Grant({number}.{epoch}, {blocks}, {readers} readers, {seconds:g} s)"
        case GrantBlocks(number, epoch):
            return f"GrantBlocks({number}.{epoch})"
    return repr(what)


def _message(message: Message) -> str:
    fields = ((name, getattr(message, name)) for name in message.__struct_fields__ if name not in _UNSAID)
    said = (f"{name}={value:x}" if name in ("src", "dst") else f"{name}={value!r}" for name, value in fields)
    return f"{type(message).__name__}({', '.join(said)})"
