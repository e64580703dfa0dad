"""Sockets of what speaks ZeroMQ: an owner's ROUTER, a reader's DEALER and the monitor that tells of its end."""

from __future__ import annotations

import zmq
from zmq.utils.monitor import recv_monitor_message

from pd_connector.errors import TransportUnavailable

QUEUED_REQUESTS = 64
"""Per peer, each way; a reader keeps fewer slices in flight than that, so only a misbehaving one loses answers."""

_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port or '*'}" if ":" in host else f"tcp://{host}:{port or '*'}"


def listen(
    context: zmq.Context[zmq.Socket[bytes]], transport: str, bind: str, max_frame: int
) -> tuple[zmq.Socket[bytes], int]:
    """A ROUTER and its port. Raises TransportUnavailable when it cannot be bound."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
    socket.setsockopt(zmq.RCVHWM, QUEUED_REQUESTS)
    socket.setsockopt(zmq.SNDHWM, QUEUED_REQUESTS)
    _set_heartbeat(socket)
    try:
        socket.bind(bind)
    except zmq.ZMQError as error:
        socket.close()
        raise TransportUnavailable(
            transport, f"cannot listen at {bind}: {error}; choose another 'host' or 'port' (0 picks a free port)"
        ) from error
    return socket, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def dial(
    context: zmq.Context[zmq.Socket[bytes]], address: str, max_frame: int
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A DEALER that never reconnects, and its monitor. Raises zmq.ZMQError."""
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
        _set_heartbeat(socket)
        monitor = socket.get_monitor_socket(_LOST)
        socket.connect(address)
    except zmq.ZMQError:
        socket.disable_monitor()
        socket.close(linger=0)
        raise
    return socket, monitor


def is_lost(monitor: zmq.Socket[bytes]) -> bool:
    """Whether the monitor, which is readable, tells that the connection is over."""
    try:
        event = recv_monitor_message(monitor, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return bool(event["event"] & _LOST)


def hang_up(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)


def _set_heartbeat(socket: zmq.Socket[bytes]) -> None:
    """A peer whose host vanished sends no FIN: notice within HEARTBEAT_TIMEOUT."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
