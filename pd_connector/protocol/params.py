"""``kv_transfer_params``: tickets as JSON, in a superset of the shape that existing routers carry (NIXL's).

Our own fields lie under one key; host and port are read from where routers may overwrite them. Nothing is encoded in
request ids, unknown keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd_connector.errors import RemoteProtocolError
from pd_connector.protocol.messages import CAPABILITY_BYTES, MAX_GROUPS
from pd_connector.protocol.ticket import ADDRESS, MAX_BLOCKS, MAX_MARKS, Ticket

KEY = "pdc"


def to_params(
    ticket: Ticket, *, request_id: str, engine_id: str, tp_size: int, pp_size: int, engines: int = 1
) -> dict[str, Any]:
    """What a prefill instance returns with its answer; JSON-safe. ``engines`` answer behind its URL, each at an address
    of its own."""
    host, port, server_key = _parts_of(ticket.address)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_block_ids": [list(group) for group in ticket.blocks],
        "remote_host": host,
        "remote_port": port,
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
            "engines": engines,
            **({"marks": [[tokens, key.hex()] for tokens, key in ticket.marks]} if ticket.marks else {}),
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
        field = f"{KEY}.marks"
        marks = tuple((_number(count, 2**32), bytes.fromhex(key)[:64]) for count, key in ours.get("marks", ()))
        if len(marks) > MAX_MARKS:
            raise ValueError("out of range")
        field = f"{KEY}.incarnation, lease, epoch, key"
        return Ticket(
            address=_address_at(host, port, server_key),
            incarnation=int(ours["incarnation"], 16) % 2**64,
            lease=_number(ours["lease"], 2**64),
            epoch=_number(ours["epoch"], 2**32),
            capability=capability,
            blocks=blocks,
            tokens=tokens,
            key=bytes.fromhex(ours["key"])[:64],
            marks=marks,
        )
        # Whatever a client may have written: it must cost its own request a recomputation and nobody anything else.
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise RemoteProtocolError(
            f"kv_transfer_params: {field}: {type(error).__name__} {error}; pass on what the prefill instance returned"
        ) from None


def _parts_of(address: str) -> tuple[str, int, str]:
    """(host, port, server key) of an agent's address; routers may overwrite the first two."""
    endpoint, _, server_key = address.removeprefix("tcp://").partition("#")
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port), server_key


def _address_at(host: str, port: int, server_key: str) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"tcp://{host}:{port}" + (f"#{server_key}" if server_key else "")


def _port(value: Any) -> int:
    """Routers may have made a string of it."""
    return int(value) if isinstance(value, str) and value.isdecimal() else _number(value, 65536)


def _number(value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{str(value)[:40]!r} is not a number below {limit}")
    return value


def transfer_params(transfer: bytes, stream: bool) -> dict[str, Any]:
    """For a prefill instance: the capability (16 bytes) that its lease is to have; with ``stream`` it grows while the
    prompt is computed."""
    return {KEY: {"transfer": transfer.hex(), "stream": stream}}


def transfer_of(params: Mapping[str, Any]) -> tuple[bytes, bool] | None:
    """(capability, stream?) that a broker chose for a prefill; None when it left that to us, or wrote nonsense."""
    ours = params.get(KEY)
    try:
        transfer = bytes.fromhex(ours["transfer"])  # type: ignore[index]
        stream = ours["stream"] is True  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        return None
    return (transfer, stream) if len(transfer) == CAPABILITY_BYTES else None


def with_report(params: Mapping[str, Any], address: str, of: bytes) -> dict[str, Any]:
    """The same parameters, asking the instance to send an Account under the id ``of`` (16 bytes) to an agent."""
    return _with(params, report={"to": address, "of": of.hex()})


def report_of(params: Mapping[str, Any]) -> tuple[str, bytes] | None:
    """(address, id) of who wants an Account; None when nobody does, or what is there is nonsense."""
    try:
        report = params[KEY]["report"]
        address, of = report["to"], bytes.fromhex(report["of"])
        valid = len(address) <= 256 and ADDRESS.fullmatch(address) and len(of) == CAPABILITY_BYTES
    except (LookupError, TypeError, ValueError):
        return None
    return (address, of) if valid else None


def with_save(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters, asking a decode instance to keep what it has in the end for the conversation's next turn:
    whoever wants its Account is then told by Saved."""
    return _with(params, save=True)


def wants_save(params: Mapping[str, Any]) -> bool:
    ours = params.get(KEY)
    return isinstance(ours, Mapping) and ours.get("save") is True


def with_prefix(params: Mapping[str, Any], ticket: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a prefill, and a ticket (as parameters) of the KV of a prefix of its prompt."""
    return _with(params, prefix=dict(ticket))


def _with(params: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    ours = params.get(KEY)
    return {**params, KEY: {**(ours if isinstance(ours, Mapping) else {}), **more}}


def prefix_of(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Parameters of the ticket of a prefix; None when there is none."""
    ours = params.get(KEY)
    found = ours.get("prefix") if isinstance(ours, Mapping) else None
    return found if isinstance(found, Mapping) else None


def stream_params(address: str, transfer: bytes) -> dict[str, Any]:
    """For a decode instance that is to read along: whom to ask for the lease of which capability."""
    host, port, server_key = _parts_of(address)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": host,
        "remote_port": port,
        KEY: {"transfer": transfer.hex(), "stream": True, "server_key": server_key},
    }


def stream_of(params: Mapping[str, Any]) -> tuple[str, bytes] | None:
    """(address, capability) of a prefill to read along with; None for parameters that carry a ticket, or nothing."""
    known = transfer_of(params)
    if known is None or not known[1]:
        return None
    try:
        host, port = str(params["remote_host"]), _port(params["remote_port"])
        server_key = str(params[KEY].get("server_key") or "")
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    address = _address_at(host, port, server_key)
    return (address, known[0]) if ADDRESS.fullmatch(address) and len(address) <= 256 else None


def address_of(params: Mapping[str, Any]) -> str | None:
    """Where the prefill instance that returned these answers, if that is one address for all its requests."""
    try:
        address = from_params(params).address
        return address if params[KEY].get("engines") == 1 else None
    except RemoteProtocolError:
        return None
