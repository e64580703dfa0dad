"""``kv_transfer_params``: tickets as JSON, in a superset of the shape that existing routers carry (NIXL's).

Our own fields lie under one key; host and port are read from where routers may overwrite them. Nothing is encoded in
request ids, unknown keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.messages import CAPABILITY_BYTES
from pd_connector.protocol.ticket import MAX_BLOCKS, Ticket

KEY = "pdc"
MAX_GROUPS = 64


def to_params(ticket: Ticket, *, request_id: str, engine_id: str, tp_size: int, pp_size: int) -> dict[str, Any]:
    """What a prefill instance returns with its answer; JSON-safe."""
    endpoint, _, server_key = ticket.address.removeprefix("tcp://").partition("#")
    host, _, port = endpoint.rpartition(":")
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_block_ids": [list(group) for group in ticket.blocks],
        "remote_host": host.strip("[]"),
        "remote_port": int(port),
        "remote_num_tokens": ticket.tokens,
        "remote_blocks_expiry_time": None,
        "tp_size": tp_size,
        "pp_size": pp_size,
        "dcp_size": 1,
        "transfer_mode": "pull",
        KEY: {
            "incarnation": f"{ticket.incarnation:016x}",
            "lease": ticket.lease,
            "epoch": ticket.epoch,
            "capability": ticket.capability.hex(),
            "key": ticket.key.hex(),
            "server_key": server_key,
        },
    }


def from_params(params: Mapping[str, Any]) -> Ticket:
    """The ticket in a decode request's parameters. Raises RemoteProtocolError naming the field that is missing or
    malformed."""
    field = "remote_host"
    try:
        host = str(params["remote_host"])
        field = "remote_port"
        port = _port(params["remote_port"])
        field = KEY
        ours = params[KEY]
        server_key = str(ours.get("server_key") or "")
        host = f"[{host}]" if ":" in host else host
        field = f"{KEY}.capability"
        capability = bytes.fromhex(ours["capability"])
        named = host and host.isascii() and server_key.isascii() and len(host) + len(server_key) <= 200
        if len(capability) != CAPABILITY_BYTES or not 0 < port < 65536 or not named:
            raise ValueError("out of range")
        field = "remote_block_ids"
        groups = params["remote_block_ids"]
        if not 0 < len(groups) <= MAX_GROUPS or any(len(group) > MAX_BLOCKS for group in groups):
            raise ValueError("out of range")
        blocks = tuple(tuple(_number(block, 2**32) for block in group) for group in groups)
        field = "remote_num_tokens"
        tokens = _number(params["remote_num_tokens"], 2**32)
        field = f"{KEY}.incarnation, lease, epoch, key"
        return Ticket(
            address=f"tcp://{host}:{port}" + (f"#{server_key}" if server_key else ""),
            incarnation=int(ours["incarnation"], 16) % 2**64,
            lease=_number(ours["lease"], 2**64),
            epoch=_number(ours["epoch"], 2**32),
            capability=capability,
            blocks=blocks,
            tokens=tokens,
            key=bytes.fromhex(ours["key"])[:64],
        )
        # Whatever a client may have written: it must cost its own request a recomputation and nobody anything else.
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise RemoteProtocolError(
            f"kv_transfer_params: {field}: {type(error).__name__} {error}; pass on what the prefill instance returned"
        ) from None


def _port(value: Any) -> int:
    """Routers may have made a string of it."""
    return int(value) if isinstance(value, str) and value.isdecimal() else _number(value, 65536)


def _number(value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{str(value)[:40]!r} is not a number below {limit}")
    return value
