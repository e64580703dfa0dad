"""Between hosts with InfiniBand or RoCE: reads by the devices themselves, see csrc/verbs.h. Memory of GPUs (GPUDirect
RDMA) was never read or written by a real one."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from pd_connector.errors import ConfigError, TransportUnavailable
from pd_connector.memory import MemoryKind, Region, native
from pd_connector.transport import rdma
from pd_connector.transport.base import Scope, Traits
from pd_connector.transport.device import pci_of
from pd_connector.transport.native import NativeTransport, addresses, check_cpus, require
from pd_connector.transport.options import Listening, parse_listening
from pd_connector.transport.rdma import Port, Rail

logger = logging.getLogger(__name__)

_SETTINGS = struct.Struct("=10IQ")
_RAIL = struct.Struct("=64sII")
Device = Annotated[str, Meta(pattern=r"^[\w.-]{1,63}(:[1-9][0-9]{0,2}(:[0-9]{1,3})?)?$")]


class VerbsOptions(Listening, frozen=True, forbid_unknown_fields=True):
    """``devices`` to use as rails ("mlx5_0", with port "mlx5_0:1", with GID index "mlx5_0:1:3"; default: those that are
    near, at most ``rails``), ``near`` a PCI address to be near to; ``queue_pairs`` per rail and owner. ``wire_verb``
    "write" has owners write where reading is slow. ``timeout`` (4.096 us * 2**timeout for an answer) and ``retries``,
    up to 6, until a peer counts as gone. ``max_reads`` under way per queue pair, as far as the devices can.
    ``max_mr_bytes`` per registration (0: what the device can). ``poll_us`` to look for completions before waiting."""

    devices: tuple[Device, ...] = ()
    near: str = ""
    rails: Annotated[int, Meta(ge=1, le=rdma.MAX_RAILS)] = 4
    queue_pairs: Annotated[int, Meta(ge=1, le=8)] = 2
    wire_verb: Literal["read", "write"] = "read"
    timeout: Annotated[int, Meta(ge=8, le=20)] = 14
    retries: Annotated[int, Meta(ge=0, le=6)] = 6
    max_reads: Annotated[int, Meta(ge=1, le=128)] = 16
    max_mr_bytes: Annotated[int, Meta(ge=0)] = 0
    poll_us: Annotated[int, Meta(ge=0, le=1000)] = 0
    relaxed_ordering: bool = True
    on_demand_paging: bool = False
    traffic_class: Annotated[int, Meta(ge=0, le=255)] = 0


class VerbsTransport(NativeTransport):
    name: ClassVar[str] = "verbs"
    backend: ClassVar[str] = "verbs"
    takes = VerbsOptions
    traits: ClassVar[Traits] = Traits(frozenset({MemoryKind.HOST, MemoryKind.CUDA}), Scope.NETWORK)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        super().check(options)
        near = options.get("near", "")
        if near and not (rdma.PCI / near).exists():
            raise ConfigError(f"transport 'verbs': near {near!r} is no PCI address of this host: see lspci -D")

    @classmethod
    def probe(cls, options: Mapping[str, Any]) -> str | None:
        try:
            require(cls.name)
            usable(parse_listening(cls.name, options, VerbsOptions))
        except TransportUnavailable as error:
            return error.reason
        except ConfigError as error:
            return str(error)
        return None

    @classmethod
    def suit(cls, options: Mapping[str, Any], regions: Sequence[Region]) -> Mapping[str, Any]:
        """Ports near to the GPU."""
        address = next(filter(None, map(pci_of, regions)), "")
        known = bool(address) and (rdma.PCI / address).exists()
        return {"near": address, **options} if known else options

    @classmethod
    def _open(cls, options: Mapping[str, Any]) -> Any:
        parsed = parse_listening(cls.name, options, VerbsOptions)
        check_cpus(cls.name, parsed.cpus)
        rails = usable(parsed)
        for rail in rails:
            logger.info("verbs: uses %s with %s: %s", rail.port.name, rail.gid, rail.why)
        return cls._start(1, parsed.cpus, False, addresses(cls.name, parsed), _pack(parsed, rails))

    def counters(self) -> dict[str, int]:
        """Since the start: work requests, batches of them (one completion each), bytes, questions to owners, writes for
        readers; lanes that opened and that were lost; registrations with on-demand paging and as dma-bufs."""
        with self._usable() as c:
            counts: dict[str, int] = c.counters(self._handle)
            return counts


def usable(options: VerbsOptions) -> list[Rail]:
    """The rails of this host. Raises TransportUnavailable with the reasons when there are none."""
    extension = native()
    reason: str | None = extension.probe(VerbsTransport.backend) if extension else "the C extension is not installed"
    if reason is not None:
        raise TransportUnavailable(VerbsTransport.name, f"{reason} (Debian: apt install libibverbs1 ibverbs-providers)")
    found = rdma.ports()
    if not found:
        raise TransportUnavailable(
            VerbsTransport.name, f"there is no RDMA device: {rdma.CLASS} is empty (is its driver loaded?)"
        )
    rails, reasons = rails_of(options, found)
    for rail in list(rails):
        if why := rdma.barred(rail.port):
            reasons[rail.port.name] = why
            rails.remove(rail)
    if not rails:
        words = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise TransportUnavailable(VerbsTransport.name, f"no port of an RDMA device can be used: {words}")
    return rails


def rails_of(options: VerbsOptions, found: Sequence[Port]) -> tuple[list[Rail], dict[str, str]]:
    """The rails that these options choose, and why not the others."""
    nodes = rdma.nodes_of(options.cpus or os.sched_getaffinity(0))
    return rdma.choose_rails(found, options.devices, options.rails, nodes, options.near)


def _pack(options: VerbsOptions, rails: Sequence[Rail]) -> bytes:
    """As verbs_settings in csrc/verbs.h."""
    numbers = _SETTINGS.pack(
        len(rails),
        options.queue_pairs,
        options.timeout,
        options.retries,
        options.max_reads,
        options.poll_us,
        options.wire_verb == "write",
        options.relaxed_ordering,
        options.on_demand_paging,
        options.traffic_class,
        options.max_mr_bytes,
    )
    packed = [_RAIL.pack(rail.port.device.encode(), rail.port.number, rail.gid.index) for rail in rails]
    return numbers + b"".join(packed + [bytes(_RAIL.size)] * (rdma.MAX_RAILS - len(rails)))
