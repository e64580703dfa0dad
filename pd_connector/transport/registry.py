"""Which transports exist here, and which one serves a pair of agents, with the reason against every other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pd_connector.errors import ConfigError, PDError, TransportUnavailable
from pd_connector.memory import MemoryKind, Region
from pd_connector.transport.base import Transport

ENTRY_POINTS = "pd_connector.transports"
ORDER = ("inproc", "shm", "cuda", "verbs", "hixl", "hccl", "tcp", "zmq")
"""Best first; ``auto`` starts those of them that exist. A transport outside this list is used when it is named."""
STAGED = ("staged-shm", "staged-verbs", "staged-tcp", "staged-zmq")
"""The same for memory that the wires of others do not reach, behind those that do."""

_BUILT_IN = {
    "inproc": "pd_connector.transport.inproc:InprocTransport",
    "shm": "pd_connector.transport.native:ShmTransport",
    "cuda": "pd_connector.transport.cuda:CudaTransport",
    "verbs": "pd_connector.transport.verbs:VerbsTransport",
    "hixl": "pd_connector.transport.hixl:HixlTransport",
    "hccl": "pd_connector.transport.hccl:HcclTransport",
    "tcp": "pd_connector.transport.native:TcpTransport",
    "zmq": "pd_connector.transport.zmq:ZmqTransport",
    "staged-shm": "pd_connector.transport.staged:StagedShm",
    "staged-verbs": "pd_connector.transport.staged:StagedVerbs",
    "staged-tcp": "pd_connector.transport.staged:StagedTcp",
    "staged-zmq": "pd_connector.transport.staged:StagedZmq",
}


@cache
def known() -> dict[str, str]:
    """Name → "module:class" of every transport: the built-in ones and the installed entry points (which win)."""
    return _BUILT_IN | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def load(name: str) -> type[Transport]:
    """The class of a transport. Raises ConfigError for an unknown name, TransportUnavailable when it cannot load."""
    value = known().get(name)
    if value is None:
        if name == "auto":
            raise ConfigError("'auto' stands alone: write transport \"auto\", or the names of the only ones to use")
        near = difflib.get_close_matches(name, known(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known()))}"
        raise ConfigError(f"there is no transport {name!r}: {hint}")
    module, _, attribute = value.partition(":")
    try:
        loaded = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TransportUnavailable(name, f"{value} cannot be loaded: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        raise TransportUnavailable(name, f"{value} is not a Transport")
    return loaded


def available(options: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Every known transport, best first, with None or why it cannot be used here. ``options``: per name."""
    result: dict[str, str | None] = {}
    for name in sorted(known(), key=_rank):
        try:
            result[name] = load(name).probe(options.get(name, {}))
        except TransportUnavailable as error:
            result[name] = error.reason
    return result


def start(
    wanted: str | Sequence[str],
    agent: str,
    options: Mapping[str, Mapping[str, Any]],
    regions: Sequence[Region] = (),
) -> tuple[dict[str, Transport], dict[str, str]]:
    """Start ``"auto"`` or the named transports, for these regions, or any of the host's: (started by wire name, in
    order of preference; reasons of the rest).

    Raises ConfigError for an unknown name (of an option too) or two transports that share a wire name,
    TransportUnavailable when one that is named or should work here does not start, or when none works here. Nothing
    stays started then.
    """
    for name, given in options.items():
        load(name).check(given)
    kinds = frozenset(region.kind for region in regions) or frozenset({MemoryKind.HOST})
    automatic = wanted == "auto"
    names = _automatic(kinds) if automatic else _named(wanted)
    started: dict[str, Transport] = {}
    reasons: dict[str, str] = {}
    try:
        for name in names:
            kind, given = load(name), options.get(name, {})
            reason = (_unwanted(kind, kinds, started) if automatic else None) or kind.probe(given)
            if reason is not None:
                if not automatic:
                    raise TransportUnavailable(name, reason)
                reasons[name] = reason
                continue
            transport = kind(agent, kind.suit(given, regions))
            if missing := kinds - transport.traits.memory:
                transport.close()
                staged = f"staged-{name}" if f"staged-{name}" in known() else "a staged one"
                raise TransportUnavailable(name, f"{_beyond(missing)}: name {staged}, or leave the choice to 'auto'")
            if transport.wire_name in started:
                transport.close()
                raise ConfigError(f"two transports serve {transport.wire_name!r}: remove one of {', '.join(names)}")
            started[transport.wire_name] = transport
        if not started:
            raise TransportUnavailable("auto", _sentence(reasons) or "no transport is installed")
    except PDError:
        for transport in started.values():
            transport.close()
        raise
    return started, reasons


def _automatic(kinds: frozenset[MemoryKind]) -> list[str]:
    names = ORDER if kinds <= {MemoryKind.HOST} else (*ORDER, *STAGED)
    return [name for name in names if name in known()]


def _unwanted(kind: type[Transport], kinds: frozenset[MemoryKind], started: Mapping[str, Transport]) -> str | None:
    """Why ``auto`` has no use for a transport beside what is started already, or None."""
    if missing := kinds - kind.traits.memory:
        return _beyond(missing)
    if kinds <= {MemoryKind.HOST} and kind.for_devices:
        return "there is no memory of a device"
    return f"{kind.instead_of} is used here" if kind.instead_of in started else None


def _beyond(missing: frozenset[MemoryKind]) -> str:
    return f"it does not reach {' and '.join(sorted(missing))} memory"


def staged_here(options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What ``auto`` would start for host memory that peers with memory of devices read, or that reads from them."""
    chosen: list[str] = []
    for name in STAGED:
        kind = load(name)
        if kind.probe(options.get(name, {})) is None and kind.instead_of not in chosen:
            chosen.append(name)
    return chosen


def choose(
    local: Mapping[str, Transport], remote: Mapping[str, bytes], preference: Sequence[str] | None = None
) -> tuple[str, dict[str, str]]:
    """The transport for one peer: (wire name, reason against every other one).

    ``remote`` maps the wire names a peer offers to its descriptions; ``preference`` names keys of ``local``, best
    first (default: the order of ``local``). Raises TransportUnavailable with every reason when none fits.
    """
    chosen: str | None = None
    reasons: dict[str, str] = {}
    order = list(local) if preference is None else [*preference, *(name for name in local if name not in preference)]
    for name in order:
        if name not in local:
            reasons[name] = "not started here"
        elif name not in remote:
            reasons[name] = "the peer does not offer it"
        elif (reason := local[name].can_reach(remote[name])) is not None:
            reasons[name] = reason
        elif chosen is None:
            chosen = name
        else:
            reasons[name] = after(chosen)
    reasons |= {name: "not started here" for name in remote if name not in order}
    if chosen is None:
        raise TransportUnavailable("auto", _sentence(reasons) or "neither side offers any")
    return chosen, reasons


def after(chosen: str) -> str:
    """The reason against a transport that would do too."""
    return f"{chosen} comes first"


def _named(wanted: str | Sequence[str]) -> list[str]:
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"transports {names}: give 'auto' or a list of different names")
    return names


def _rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def _sentence(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
