"""The side channel: frames between agents over ZeroMQ. It carries bytes and knows no policy.

One ROUTER is bound; every dialled address gets a DEALER of its own. Frames that cannot be sent at once are dropped and
counted, never waited for: the protocol repeats what is unanswered.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import zmq
import zmq.auth
import zmq.auth.thread
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from pd_connector.config import Config, engine_host_ip, is_loopback
from pd_connector.errors import ConfigError
from pd_connector.protocol.messages import MAX_FRAME, Message, encode

logger = logging.getLogger(__name__)

INCOMING = "in:"
_BATCH = 64  # frames handled per wake-up, so that a flood does not starve the loop
_MAX_DIALLED = 1024
_SOCKETS_PER_DIAL = 3  # libzmq's: the connection, and both ends of its monitor
_QUEUE = 4096  # frames per connection
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class SideChannel:
    """``on_frame(route, frame)``, ``on_lost(address, reason)`` for a connection that broke, and
    ``on_unreachable(address)`` for an attempt to connect that failed and will be repeated, are called on the loop that
    ``start`` ran on."""

    def __init__(
        self,
        config: Config,
        on_frame: Callable[[str, bytes], None],
        on_lost: Callable[[str, str], None],
        on_unreachable: Callable[[str], None],
    ) -> None:
        self._config = config
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_unreachable = on_unreachable
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, _SOCKETS_PER_DIAL * (_MAX_DIALLED + 2) + 16)
        self._auth: zmq.auth.thread.ThreadAuthenticator | None = None
        self._dialled: OrderedDict[str, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = OrderedDict()
        self._router: zmq.Socket[bytes] | None = None
        self._closed = False
        self.counters: Counter[str] = Counter()
        self.address = ""

    def start(self) -> None:
        """Bind and listen. Raises ConfigError when the address cannot be bound."""
        self._loop = asyncio.get_running_loop()
        config = self._config
        if config.secret_key:
            self._auth = zmq.auth.thread.ThreadAuthenticator(self._context)
            self._auth.start()
            self._auth.configure_curve_callback("*", _AllowedKeys(admitted(config)))
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if config.secret_key:
            self._router.curve_server = True
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            self._router.bind(f"tcp://{host}:{config.port or '*'}")
        except zmq.ZMQError as error:
            self.close()()
            raise ConfigError(
                f"cannot listen on {config.host} port {config.port}: {error}; "
                "choose a free port (or port 0) and an address of this host"
            ) from None
        port = self._router.getsockopt(zmq.LAST_ENDPOINT).decode().rsplit(":", 1)[1]  # type: ignore[union-attr]
        told = advertised_host(config)
        self.address = f"tcp://{f'[{told}]' if ':' in told else told}:{port}"
        if config.public_key:
            self.address += f"#{z85.decode(config.public_key.encode()).hex()}"
        self._watch(self._router, self._drain_router)

    def send(self, route: str, frame: bytes) -> None:
        """Send to an incoming route or to an address, dialling it if need be."""
        if self._closed:
            return
        if route.startswith(INCOMING):
            parts, target, drain = [bytes.fromhex(route[len(INCOMING) :]), frame], self._router, self._drain_router
            assert target is not None
        else:
            dialled = self._dial(route)
            if dialled is None:
                return
            parts, target, drain = [frame], dialled, lambda: self._drain_dealer(route)
        try:
            target.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.counters["frames_unsent"] += 1
            logger.debug("frame to %s not sent: %s", route, error)
        # libzmq's descriptor is edge-triggered and sending consumes edges: look for frames that came meanwhile.
        self._loop.call_soon(drain)

    def send_message(self, route: str, message: Message) -> None:
        self.send(route, encode(message))

    def hangup(self, address: str) -> None:
        pair = self._dialled.pop(address, None)
        if pair is not None:
            dealer, monitor = pair
            self._unwatch(dealer)
            self._unwatch(monitor)
            dealer.disable_monitor()
            monitor.close(0)
            dealer.close(1000)

    def close(self) -> Callable[[], None]:
        """Close every socket. What is returned frees the rest and may block up to 1 s, until the frames just sent are
        out or their linger is over: call it outside of the loop."""
        if self._closed:
            return lambda: None
        self._closed = True
        for address in list(self._dialled):
            self.hangup(address)
        if self._router is not None:
            self._unwatch(self._router)
            self._router.close(1000)
        if self._auth is not None:
            self._auth.stop()
        return self._context.term

    # --- sockets ------------------------------------------------------------------------------------------------------

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        created: zmq.Socket[bytes] = self._context.socket(kind)
        created.setsockopt(zmq.IPV6, 1)
        created.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        created.setsockopt(zmq.SNDHWM, _QUEUE)
        created.setsockopt(zmq.RCVHWM, _QUEUE)
        created.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        created.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        if self._config.secret_key:
            created.curve_publickey = self._config.public_key.encode()
            created.curve_secretkey = self._config.secret_key.encode()
        return created

    def _dial(self, address: str) -> zmq.Socket[bytes] | None:
        pair = self._dialled.get(address)
        if pair is not None:
            self._dialled.move_to_end(address)
            return pair[0]
        endpoint, _, key = address.partition("#")
        problem = self._key_problem(key)
        if problem:
            self.counters["dials_refused"] += 1
            self._loop.call_soon(self._on_lost, address, problem)
            return None
        if len(self._dialled) >= _MAX_DIALLED:
            self.hangup(next(iter(self._dialled)))
        dealer: zmq.Socket[bytes] | None = None
        try:
            dealer = self._socket(zmq.DEALER)
            if key:
                dealer.curve_serverkey = z85.encode(bytes.fromhex(key))
            monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(_LOST | zmq.EVENT_CLOSED)
            dealer.connect(endpoint)
        except (zmq.ZMQError, ValueError) as error:
            if dealer is not None:
                dealer.disable_monitor()
                dealer.close(0)
            self._loop.call_soon(self._on_lost, address, f"cannot be dialled: {error}")
            return None
        self._dialled[address] = (dealer, monitor)
        self._watch(dealer, lambda: self._drain_dealer(address))
        self._watch(monitor, lambda: self._drain_monitor(address))
        return dealer

    def _key_problem(self, key: str) -> str:
        if bool(key) != bool(self._config.secret_key):
            ours, theirs = ("none", "a key") if key else ("a key", "none")
            return f"keys: we have {ours}, the peer's address has {theirs}; configure both sides alike"
        if key:
            try:
                known = z85.encode(bytes.fromhex(key)).decode() in admitted(self._config)
            except ValueError:
                return "keys: the peer's address carries a malformed key"
            if not known:
                return "keys: the peer's public key is not in allowed_keys"
        return ""

    def _watch(self, target: zmq.Socket[bytes], callback: Callable[[], None]) -> None:
        self._loop.add_reader(target.getsockopt(zmq.FD), callback)  # type: ignore[arg-type]
        self._loop.call_soon(callback)

    def _unwatch(self, target: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(target.getsockopt(zmq.FD))  # type: ignore[arg-type]

    # --- receiving ----------------------------------------------------------------------------------------------------

    def _drain_router(self) -> None:
        router = self._router
        if self._closed or router is None:
            return
        for _ in range(_BATCH):
            if not _readable(router):
                return
            try:
                parts = router.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if len(parts) == 2:
                self._on_frame(INCOMING + parts[0].hex(), parts[1])
            else:
                self.counters["frames_malformed"] += 1
        self._loop.call_soon(self._drain_router)

    def _drain_dealer(self, address: str) -> None:
        for _ in range(_BATCH):
            pair = self._dialled.get(address)
            if pair is None or not _readable(pair[0]):
                return
            try:
                parts = pair[0].recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if len(parts) == 1:
                self._on_frame(address, parts[0])
            else:
                self.counters["frames_malformed"] += 1
        self._loop.call_soon(self._drain_dealer, address)

    def _drain_monitor(self, address: str) -> None:
        pair = self._dialled.get(address)
        if pair is None:
            return
        try:
            event = recv_monitor_message(pair[1], zmq.NOBLOCK)
        except zmq.ZMQError:
            return
        if event["event"] == zmq.EVENT_CLOSED:
            self._on_unreachable(address)
        else:
            lost = event["event"] == zmq.EVENT_DISCONNECTED
            refused = (
                "the peer refused our keys" if self._config.secret_key else "keys: the peer wants some, we have none"
            )
            self._on_lost(address, "the peer closed it" if lost else refused)
        self._loop.call_soon(self._drain_monitor, address)


def _readable(target: zmq.Socket[bytes]) -> bool:
    """Asking costs a tenth of an exception from a socket that has nothing."""
    events: Any = target.getsockopt(zmq.EVENTS)
    return bool(events & zmq.POLLIN)


def admitted(config: Config) -> tuple[str, ...]:
    """Whose public keys are: those of the peers, and one's own, which the other agents of an instance have too."""
    return (*config.allowed_keys, config.public_key)


class _AllowedKeys:
    """Credentials check of zmq.auth: only listed public keys get in."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = frozenset(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        return key.decode() in self._keys  # Z85, as in the configuration


def advertised_host(config: Config) -> str:
    """The host that peers are told, for every socket of an agent. Raises ConfigError when there is no telling."""
    host = config.advertise or ("" if is_loopback(config.host) else engine_host_ip())
    if not host:
        host = config.host if config.host not in ("0.0.0.0", "::", "*") else _outgoing_address()
    return host


def _outgoing_address() -> str:
    """The address of the interface that the default route uses; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: never a real host
            address: Any = probe.getsockname()[0]
        except OSError:
            raise ConfigError(
                "no route out of this host to tell peers an address by: set 'advertise' (or VLLM_HOST_IP)"
            ) from None
    return str(address)
