"""Options of a transport (config ``transport_options[name]``), checked against a struct of what there is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from pd_connector.config import Cpu
from pd_connector.errors import ConfigError

Options = TypeVar("Options", bound=msgspec.Struct)


class Listening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``host`` and ``port`` to bind (0: any free port), ``advertise`` the host peers are told (default: ``host``),
    ``cpus`` the processors of the background threads (default: all this process may use)."""

    host: str = "127.0.0.1"
    port: int = 0
    advertise: str = ""
    cpus: tuple[Cpu, ...] = ()


L = TypeVar("L", bound=Listening)


def parse_options(transport: str, options: Mapping[str, Any], kind: type[Options]) -> Options:
    """Raises ConfigError, for an unknown option with the nearest known one."""
    known = kind.__struct_fields__
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"transport {transport!r} has no option {key!r}: {hint}")
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of transport {transport!r}: {error}") from error


def parse_listening(transport: str, options: Mapping[str, Any], kind: type[L]) -> L:
    """As parse_options, for a transport that listens. Raises ConfigError."""
    parsed = parse_options(transport, options, kind)
    if not 0 <= parsed.port <= 65535:
        raise ConfigError(f"transport {transport!r}: port {parsed.port} is not in 0..65535")
    if parsed.host in ("0.0.0.0", "::", "*") and not parsed.advertise:
        raise ConfigError(
            f"transport {transport!r} listens at {parsed.host}: set 'advertise' to the address that peers can reach"
        )
    return parsed
