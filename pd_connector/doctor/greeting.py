"""Who answers at an address: real HELLOs over the side channel, as an agent without memory says them."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from pd_connector.config import Config
from pd_connector.errors import ConfigError, PDError, PeerLost, RemoteProtocolError
from pd_connector.protocol.messages import VERSION, Hello, Welcome, decode
from pd_connector.protocol.ticket import ADDRESS
from pd_connector.runtime.side_channel import SideChannel

ROUNDS = 20
_CONNECT_S = 3.0
_ANSWER_S = 4.0
_RANKS_S = 30.0
_MOST_RANKS = 64
_NAME = "pdc-doctor"


@dataclass(frozen=True)
class Greeting:
    """``round_trips``: seconds from a HELLO to its Welcome, without the first one, which also connects."""

    address: str
    welcome: Welcome
    round_trips: tuple[float, ...]


@dataclass(frozen=True)
class Met:
    """Who answered, and by rank those that it speaks for, or why one of them did not answer."""

    speaker: Greeting
    ranks: dict[int, Greeting | PDError]
    passed_over: int = 0
    """Ranks that were named, but were too many, or came too late, to be greeted."""


def parse_address(text: str) -> str:
    """HOST:PORT or tcp://HOST:PORT[#KEY] as agents write it. Raises ConfigError."""
    address = text if "://" in text else f"tcp://{text}"
    try:
        usable = ADDRESS.fullmatch(address) is not None and bool(urlsplit(address).port)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{text!r} is not an agent's address: write HOST:PORT or tcp://HOST:PORT#KEY, as it logs it")
    return address


def without_key(address: str) -> str:
    return address.partition("#")[0]


async def meet(config: Config, address: str) -> Met:
    """Greet an address and every rank that it names. Raises PeerLost and RemoteProtocolError about the address."""
    async with _Caller(config) as caller:
        speaker = await caller.greet(address)
        ranks: dict[int, Greeting | PDError] = {}
        directory, end = speaker.welcome.directory, time.monotonic() + _RANKS_S
        for number, endpoint in enumerate(directory):
            if number >= _MOST_RANKS or time.monotonic() > end:
                return Met(speaker, ranks, len(directory) - number)
            try:
                ranks[endpoint.rank] = greeting = await caller.greet(parse_address(endpoint.address))
            except PDError as error:
                ranks[endpoint.rank] = error
                continue
            if greeting.welcome.src != endpoint.incarnation:
                ranks[endpoint.rank] = PeerLost(f"another agent answers at {without_key(endpoint.address)}")
        return Met(speaker, ranks)


class _Caller:
    def __init__(self, config: Config) -> None:
        self._incarnation = secrets.randbits(63) | 1
        self._channel = SideChannel(
            config, self._on_frame, self._on_lost, lambda address: self._on_lost(address, "it does not listen any more")
        )
        self._address = ""
        self._answer: asyncio.Future[Welcome] | None = None

    async def __aenter__(self) -> _Caller:
        self._channel.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._channel.close())

    async def greet(self, address: str) -> Greeting:
        await _knock(address)
        await self._hello(address)
        round_trips = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            welcome = await self._hello(address)
            round_trips.append(time.perf_counter() - start)
        return Greeting(address, welcome, tuple(round_trips))

    async def _hello(self, address: str) -> Welcome:
        self._address, self._answer = address, asyncio.get_running_loop().create_future()
        # The model is left out: whether ours is the peer's is compared by us, and a doctor has none.
        self._channel.send_message(
            address,
            Hello(src=self._incarnation, dst=0, version=VERSION, agent=_NAME, model="", layout=None, transports={}),
        )
        try:
            return await asyncio.wait_for(self._answer, _ANSWER_S)
        except TimeoutError:
            raise PeerLost(
                f"{without_key(address)} takes connections but does not answer HELLO within {_ANSWER_S:g} s: "
                "is this the port of an agent, and are its keys the ones that its address names?"
            ) from None

    def _on_frame(self, route: str, frame: bytes) -> None:
        if route != self._address or self._answer is None or self._answer.done():
            return
        try:
            message = decode(frame)
        except RemoteProtocolError as error:
            self._answer.set_exception(RemoteProtocolError(f"{without_key(route)} answers HELLO with {error}"))
            return
        if isinstance(message, Welcome) and message.dst == self._incarnation:
            self._answer.set_result(message)

    def _on_lost(self, address: str, reason: str) -> None:
        if address == self._address and self._answer is not None and not self._answer.done():
            self._answer.set_exception(
                PeerLost(f"{without_key(address)} cannot be greeted: {reason}; {_remedy(reason)}")
            )


def _remedy(reason: str) -> str:
    """What to do when a connection was made and then ended, by the side channel's words."""
    keys = "give its whole address with #KEY, as it logs it, and --config FILE with our keys"
    if "allowed_keys" in reason:
        return "add it there if it is right"
    if reason.startswith("keys:"):
        return keys
    if "refused our keys" in reason:
        return "add our public_key to its allowed_keys"
    return f"is it an agent's port (and not the one for HTTP)? If it has keys, {keys}; if it has none, use none"


async def _knock(address: str) -> None:
    """Plain TCP first: the system says what is wrong, where ZeroMQ would go on trying. Raises PeerLost."""
    where = urlsplit(address)
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(where.hostname, where.port)
    except TimeoutError:
        raise PeerLost(
            f"{without_key(address)} does not take a TCP connection within {_CONNECT_S:g} s: "
            "is its host up, and does a firewall let us through?"
        ) from None
    except OSError as error:
        # asyncio words a refusal as "Connect call failed"; errors of name resolution have numbers of their own.
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror or error
        raise PeerLost(
            f"{without_key(address)} cannot be connected to ({why}): "
            "does it run, are host and port right, and does it listen on that address (host)?"
        ) from None
    writer.close()
