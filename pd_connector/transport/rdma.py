"""Ports of RDMA devices: what the kernel tells of them, and which of them, with which GID, an agent should use and why.

Reading is one function, ``ports``; everything else is pure.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

CLASS = Path("/sys/class/infiniband")
NODES = Path("/sys/devices/system/node")
PCI = Path("/sys/bus/pci/devices")
DEV = Path("/dev/infiniband")
MAX_RAILS = 8
ETHERNET, INFINIBAND = "Ethernet", "InfiniBand"
ROCE_V2 = "RoCE v2"


@dataclass(frozen=True, slots=True)
class Gid:
    """An address of a port. ``kind`` as the kernel says: "RoCE v2" or "IB/RoCE v1"."""

    index: int
    address: IPv6Address
    kind: str

    @property
    def routed(self) -> bool:
        """Whether it is more than an address on its own link."""
        return not self.address.is_link_local

    def __str__(self) -> str:
        return f"GID {self.index} ({self.kind}, {self.address.ipv4_mapped or self.address})"


@dataclass(frozen=True, slots=True)
class Port:
    """``state`` as in "ACTIVE", ``rate`` as in "100 Gb/sec (4X EDR)". ``numa`` is -1 where the kernel does not know;
    ``path`` the device's place among the buses; ``uverbs`` the file a process opens it by."""

    device: str
    number: int
    state: str
    link: str
    rate: str
    gids: tuple[Gid, ...]
    numa: int = -1
    path: tuple[str, ...] = ()
    uverbs: str = ""

    @property
    def name(self) -> str:
        return f"{self.device}:{self.number}"


@dataclass(frozen=True, slots=True)
class Rail:
    """A port with the GID to use, and why this one."""

    port: Port
    gid: Gid
    why: str


def ports(root: Path = CLASS) -> list[Port]:
    """Every port of every RDMA device of this host, by name; none where there is no such device."""
    try:
        devices = sorted(root.iterdir())
    except OSError:
        return []
    found = []
    for device in devices:
        place = Path(os.path.realpath(device / "device"))
        for folder in sorted((device / "ports").iterdir(), key=lambda each: int(each.name)):
            found.append(
                Port(
                    device.name,
                    int(folder.name),
                    _read(folder / "state").partition(": ")[2],
                    _read(folder / "link_layer"),
                    _read(folder / "rate"),
                    tuple(_gids(folder)),
                    int(_read(device / "device" / "numa_node") or -1),
                    place.parts if place.exists() else (),
                    _uverbs(root, device.name),
                )
            )
    return found


def _gids(folder: Path) -> list[Gid]:
    found = []
    for entry in sorted((folder / "gids").iterdir(), key=lambda each: int(each.name)):
        text = _read(entry)
        if text and (address := IPv6Address(text)) != IPv6Address(0) and int(address) & (2**64 - 1):
            found.append(Gid(int(entry.name), address, _read(folder / "gid_attrs" / "types" / entry.name)))
    return found


def _uverbs(root: Path, device: str) -> str:
    for entry in sorted((root.parent / "infiniband_verbs").glob("uverbs*")):
        if _read(entry / "ibdev") == device:
            return entry.name
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # of a GID that is not in use, too
        return ""


def choose_gid(port: Port, index: int | None = None) -> tuple[Gid | None, str]:
    """The GID of a port to use, and why this one or none."""
    if index is not None:
        asked = next((gid for gid in port.gids if gid.index == index), None)
        return asked, "as configured" if asked else f"it has no GID {index}"
    if not port.gids:
        return None, "it has no GID: has its network interface an address?"
    if port.link == INFINIBAND:
        return port.gids[0], "the port's own"
    second = [gid for gid in port.gids if gid.kind == ROCE_V2]
    for gid in second:
        if gid.address.ipv4_mapped:
            return gid, "RoCE v2 over IPv4 is routed and every switch knows it"
    for gid in second:
        if gid.routed:
            return gid, "RoCE v2 over IPv6: the interface has no IPv4 address"
    if second:
        return second[0], "RoCE v2 on its own link only: the interface has no address but a link-local one"
    return port.gids[0], "RoCE v1 on its own link only: the device has no RoCE v2"


def choose_rails(
    found: Sequence[Port],
    wanted: Sequence[str] = (),
    most: int = MAX_RAILS,
    nodes: Collection[int] = (),
    near: str = "",
) -> tuple[list[Rail], dict[str, str]]:
    """The rails to use, nearest first, and for every other port why not. ``wanted`` names devices as "mlx5_0",
    "mlx5_0:1" (port) or "mlx5_0:1:3" (GID); without it all that are active are candidates: the nearest ones to ``near``
    (a PCI address, as of an accelerator), else those of the NUMA ``nodes`` that this process runs on, at most ``most``.
    """
    rails: list[Rail] = []
    reasons: dict[str, str] = {}
    for port in found:
        asked = _asked(port, wanted)
        if wanted and asked is None:
            reasons[port.name] = "not among the configured 'devices'"
        elif port.state != "ACTIVE":
            reasons[port.name] = f"its link is {port.state or 'in an unknown state'}"
        else:
            gid, why = choose_gid(port, asked if asked is not None and asked >= 0 else None)
            if gid is None:
                reasons[port.name] = why
            else:
                rails.append(Rail(port, gid, why))
    for name in wanted:
        if not any(_asked(port, [name]) is not None for port in found):
            reasons[name] = "there is no such port"
    if wanted:
        return rails[:MAX_RAILS], reasons
    distance = {rail.port.name: _distance(rail.port, nodes, near) for rail in rails}
    nearest = min(distance.values(), default=(0, ""))
    for rail in rails:
        if distance[rail.port.name][0] > nearest[0]:
            reasons[rail.port.name] = distance[rail.port.name][1]
    chosen = [rail for rail in rails if rail.port.name not in reasons]
    for rail in chosen[most:]:
        reasons[rail.port.name] = f"{most} others are used already ('rails')"
    return chosen[:most], reasons


def _asked(port: Port, wanted: Sequence[str]) -> int | None:
    """None: it is not wanted; -1: with any GID; else with this one."""
    for name in wanted:
        device, _, rest = name.partition(":")
        number, _, gid = rest.partition(":")
        if device == port.device and number in ("", str(port.number)):
            return int(gid) if gid else -1
    return None


def _distance(port: Port, nodes: Collection[int], near: str) -> tuple[int, str]:
    """How far a port is, and that in words."""
    if near:
        place = Path(os.path.realpath(PCI / near)).parts
        common = 0
        for one, other in zip(port.path, place, strict=False):
            if one != other:
                break
            common += 1
        return len(place) - common, f"others are nearer to {near} on the PCI bus"
    if port.numa < 0 or not nodes or port.numa in nodes:
        return 0, ""
    return 1, f"it is at NUMA node {port.numa}, this process is not"


def nodes_of(processors: Collection[int], root: Path = NODES) -> set[int]:
    """NUMA nodes that these processors belong to."""
    found = set()
    for node in root.glob("node[0-9]*"):
        cpus: set[int] = set()
        for span in filter(None, _read(node / "cpulist").split(",")):
            first, _, last = span.partition("-")
            cpus |= set(range(int(first), int(last or first) + 1))
        if cpus & set(processors):
            found.add(int(node.name.removeprefix("node")))
    return found


def barred(port: Port, folder: Path = DEV) -> str | None:
    """Why this process may not open the port's device, or None."""
    file = folder / port.uverbs
    if not port.uverbs or not file.exists():
        return (
            f"{file if port.uverbs else folder} is missing: docker run --device={folder} (modprobe ib_uverbs on a host)"
        )
    if not os.access(file, os.R_OK | os.W_OK):
        return f"{file} may not be read and written by this user: chmod, or a udev rule"
    return None
