"""RDMA devices of this host: which ports are used with which GID, what bars the others, what may be registered."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

from pd_connector.doctor.report import Row, State
from pd_connector.errors import ConfigError
from pd_connector.memory import native
from pd_connector.transport.options import parse_listening
from pd_connector.transport.rdma import Port, Rail, barred, ports
from pd_connector.transport.verbs import VerbsOptions, VerbsTransport, rails_of

_DEVICES, _LINK, _GID, _RIGHTS, _LOCKED, _DMA_BUF = (
    "RDMA devices",
    "RDMA link",
    "RDMA GID",
    "RDMA permission",
    "locked memory",
    "RDMA dma-buf",
)


def rows(options: Mapping[str, object]) -> list[Row]:
    """``options`` are those of transport "verbs". One row only where there is no device: nobody needs one."""
    try:
        parsed = parse_listening(VerbsTransport.name, options, VerbsOptions)
    except ConfigError as error:
        return [Row(_DEVICES, State.FAIL, str(error), "mend transport_options.verbs")]
    found = ports()
    extension = native()
    library = extension.probe(VerbsTransport.backend) if extension else "the C extension is not installed"
    rails, reasons = rails_of(parsed, found)
    made = devices(found, library)
    if not found:
        return made
    made += links(found) + gids(rails, reasons) + [permission(rail.port, barred(rail.port)) for rail in rails]
    made.append(locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]))
    if extension and library is None:
        made += [dma_buf(rail.port.device, extension.dma_buf(rail.port.device)) for rail in rails]
    return made


def devices(found: Sequence[Port], library: str | None) -> list[Row]:
    if not found:
        return [Row(_DEVICES, State.OK, "none: other hosts are reached over tcp")]
    names = ", ".join(port.name for port in found)
    if library is not None:
        return [Row(_DEVICES, State.WARN, f"{names}, but {library}", "apt install libibverbs1 ibverbs-providers")]
    return [Row(_DEVICES, State.OK, names)]


def links(found: Sequence[Port]) -> list[Row]:
    made = []
    for port in found:
        place = f"NUMA node {port.numa}" if port.numa >= 0 else "no NUMA node known"
        words = f"{port.name}: {port.state or 'unknown'}, {port.rate or 'rate unknown'}, {port.link}, {place}"
        if port.state == "ACTIVE":
            made.append(Row(_LINK, State.OK, words))
        else:
            remedy = (
                "ip link set its network interface up; look at the cable, the switch's port and (InfiniBand) opensm"
            )
            made.append(Row(_LINK, State.WARN, words, remedy))
    return made


def gids(rails: Sequence[Rail], reasons: Mapping[str, str]) -> list[Row]:
    made = [Row(_GID, State.OK, f"{rail.port.name}: {rail.gid}: {rail.why}") for rail in rails]
    for name, why in reasons.items():
        state = State.WARN if "GID" in why or "no such port" in why else State.OK
        remedy = "give its interface an address, or name another 'devices'" if state is State.WARN else ""
        made.append(Row(_GID, state, f"{name} is not used: {why}", remedy))
    return made


def permission(port: Port, why: str | None) -> Row:
    if why is None:
        return Row(_RIGHTS, State.OK, f"{port.name}: {port.uverbs} may be opened")
    words, _, remedy = why.partition(": ")
    return Row(_RIGHTS, State.FAIL, f"{port.name}: {words}", remedy)


def locked_memory(limit: int) -> Row:
    """``limit`` in bytes: registered memory is locked."""
    if limit == resource.RLIM_INFINITY:
        return Row(_LOCKED, State.OK, "no limit")
    remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity"
    return Row(_LOCKED, State.WARN, f"limit {limit >> 10} KiB: no more can be registered (root is not limited)", remedy)


def dma_buf(device: str, why_not: str | None) -> Row:
    if why_not is None:
        return Row(_DMA_BUF, State.OK, f"{device}: taken")
    return Row(_DMA_BUF, State.OK, f"{device}: {why_not}; device memory needs a peer-memory module, or is staged")
