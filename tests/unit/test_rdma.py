"""Which ports of RDMA devices are used, and why: from a made-up /sys, so that no device is needed."""

from __future__ import annotations

import resource
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from pd_connector.doctor import rdma as doctor
from pd_connector.doctor.report import State
from pd_connector.errors import ConfigError, TransportUnavailable
from pd_connector.transport import rdma
from pd_connector.transport.rdma import Gid, Port, choose_gid, choose_rails, nodes_of, ports
from pd_connector.transport.verbs import VerbsTransport

V1, V2 = "IB/RoCE v1", "RoCE v2"
LINK_LOCAL, IPV4, IPV6 = "fe80::1", "::ffff:10.1.2.3", "2001:db8::7"


def gids(*kinds: tuple[str, str]) -> tuple[Gid, ...]:
    return tuple(Gid(index, IPv6Address(address), kind) for index, (address, kind) in enumerate(kinds))


COMMON = gids((LINK_LOCAL, V1), (LINK_LOCAL, V2), (IPV4, V1), (IPV4, V2))


def port(device: str = "mlx5_0", number: int = 1, **more: object) -> Port:
    told = {
        "state": "ACTIVE",
        "link": rdma.ETHERNET,
        "rate": "100 Gb/sec (4X EDR)",
        "gids": COMMON,
        "uverbs": "uverbs0",
    }
    return Port(device, number, **{**told, **more})  # type: ignore[arg-type]


def make_device(root: Path, name: str, state: str = "4: ACTIVE", numa: str = "0") -> None:
    folder = root / "infiniband" / name
    for part in ("gids", "gid_attrs/types"):
        (folder / "ports/1" / part).mkdir(parents=True)
    place = root / "pci0" / f"0000:{name[-1]}0:00.0"
    place.mkdir(parents=True)
    (place / "numa_node").write_text(numa)
    (folder / "device").symlink_to(place)
    for file, words in (("state", state), ("link_layer", "Ethernet"), ("rate", "25 Gb/sec (1X EDR)")):
        (folder / "ports/1" / file).write_text(f"{words}\n")
    for index, gid in enumerate(COMMON):
        (folder / f"ports/1/gids/{index}").write_text(f"{gid.address.exploded}\n")
        (folder / f"ports/1/gid_attrs/types/{index}").write_text(f"{gid.kind}\n")
    (folder / "ports/1/gids/9").write_text(f"{IPv6Address(0).exploded}\n")  # not in use
    file = root / "infiniband_verbs" / f"uverbs{name[-1]}"
    file.mkdir(parents=True)
    (file / "ibdev").write_text(f"{name}\n")


def test_what_the_kernel_tells(tmp_path: Path) -> None:
    make_device(tmp_path, "mlx5_1", numa="1")
    make_device(tmp_path, "mlx5_0", state="1: DOWN", numa="-1")
    first, second = ports(tmp_path / "infiniband")
    assert (first.name, first.state, first.numa, first.uverbs) == ("mlx5_0:1", "DOWN", -1, "uverbs0")
    assert (second.name, second.state, second.numa) == ("mlx5_1:1", "ACTIVE", 1)
    assert second.gids == COMMON
    assert second.rate == "25 Gb/sec (1X EDR)"
    assert second.path[-2:] == ("pci0", "0000:10:00.0")
    assert ports(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("found", "index", "words"),
    [
        (port(), 3, "over IPv4"),
        (port(gids=gids((LINK_LOCAL, V1), (LINK_LOCAL, V2), (IPV6, V2))), 2, "over IPv6"),
        (port(gids=gids((LINK_LOCAL, V1), (LINK_LOCAL, V2))), 1, "its own link only"),
        (port(gids=gids((LINK_LOCAL, V1))), 0, "no RoCE v2"),
        (port(gids=()), None, "has its network interface an address?"),
        (port(link=rdma.INFINIBAND, gids=gids((LINK_LOCAL, V1), (IPV6, V1))), 0, "the port's own"),
    ],
)
def test_the_gid(found: Port, index: int | None, words: str) -> None:
    gid, why = choose_gid(found)
    assert (gid and gid.index) == index
    assert words in why


def test_a_gid_that_is_asked_for() -> None:
    gid, why = choose_gid(port(), 0)
    assert gid == COMMON[0]
    assert why == "as configured"
    assert choose_gid(port(), 8) == (None, "it has no GID 8")


def names(chosen: list[rdma.Rail]) -> list[str]:
    return [rail.port.name for rail in chosen]


def test_ports_that_cannot_be_used_say_why() -> None:
    found = [port(), port("mlx5_1", state="DOWN"), port("mlx5_2", gids=()), port("mlx5_3")]
    rails, reasons = choose_rails(found)
    assert names(rails) == ["mlx5_0:1", "mlx5_3:1"]
    assert reasons["mlx5_1:1"] == "its link is DOWN"
    assert "no GID" in reasons["mlx5_2:1"]


def test_devices_that_are_asked_for() -> None:
    found = [port(), port("mlx5_1"), port("mlx5_1", 2), port("mlx5_2")]
    rails, reasons = choose_rails(found, ["mlx5_1:2:1", "mlx5_2", "mlx5_7"])
    assert names(rails) == ["mlx5_1:2", "mlx5_2:1"]
    assert [rail.gid.index for rail in rails] == [1, 3]
    assert reasons["mlx5_7"] == "there is no such port"
    assert "not among" in reasons["mlx5_1:1"]


def test_the_nearest_ones_are_used() -> None:
    found = [port(f"mlx5_{index}", numa=index // 2) for index in range(4)]
    rails, reasons = choose_rails(found, nodes={1})
    assert names(rails) == ["mlx5_2:1", "mlx5_3:1"]
    assert "NUMA node 0" in reasons["mlx5_0:1"]
    assert names(choose_rails(found, nodes={0, 1}, most=3)[0]) == ["mlx5_0:1", "mlx5_1:1", "mlx5_2:1"]
    assert "'rails'" in choose_rails(found, nodes={0, 1}, most=3)[1]["mlx5_3:1"]
    assert len(choose_rails(found, nodes={7})[0]) == 4, "far is better than none"


def test_near_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("root1/switch/gpu", "root1/switch/nic", "root1/nic", "root2/nic"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices/0000:3b:00.0").symlink_to(tmp_path / "root1/switch/gpu")
    monkeypatch.setattr(rdma, "PCI", tmp_path / "devices")
    found = [
        port(f"mlx5_{i}", path=(tmp_path / place).parts)
        for i, place in enumerate(("root2/nic", "root1/switch/nic", "root1/nic"))
    ]
    rails, reasons = choose_rails(found, near="0000:3b:00.0")
    assert names(rails) == ["mlx5_1:1"]
    assert "nearer to 0000:3b:00.0" in reasons["mlx5_2:1"]


def test_numa_nodes(tmp_path: Path) -> None:
    for node, cpus in ((0, "0-3,8-11"), (1, "4-7"), (2, "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}/cpulist").write_text(f"{cpus}\n")
    assert nodes_of({9, 2}, tmp_path) == {0}
    assert nodes_of({4, 11}, tmp_path) == {0, 1}
    assert nodes_of({77}, tmp_path) == set()


def test_a_device_that_may_not_be_opened(tmp_path: Path) -> None:
    assert "--device" in str(rdma.barred(port(), tmp_path))
    (tmp_path / "uverbs0").touch()
    assert rdma.barred(port(), tmp_path) is None


@pytest.mark.parametrize(
    "options",
    [
        {"devices": ["mlx5_0:"]},
        {"devices": ["a b"]},
        {"retries": 7},
        {"queue_pairs": 0},
        {"wire_verb": "send"},
        {"rail": 1},
    ],
)
def test_options_that_cannot_be(options: dict[str, object]) -> None:
    """Seven retries are for ever to some devices."""
    assert VerbsTransport.probe(options) is not None
    with pytest.raises((ConfigError, TransportUnavailable)):
        VerbsTransport("agent", options)


@pytest.mark.parametrize(
    ("row", "state", "words", "remedy"),
    [
        (doctor.devices([], "whatever")[0], State.OK, "none", ""),
        (doctor.devices([port()], "libibverbs.so.1 cannot be opened")[0], State.WARN, "mlx5_0:1, but", "apt install"),
        (doctor.devices([port(), port("mlx5_1")], None)[0], State.OK, "mlx5_0:1, mlx5_1:1", ""),
        (doctor.links([port(numa=1)])[0], State.OK, "100 Gb/sec (4X EDR), Ethernet, NUMA node 1", ""),
        (doctor.links([port(state="DOWN")])[0], State.WARN, "DOWN", "cable"),
        (doctor.gids([], {"mlx5_0:1": "it has no GID: has its"})[0], State.WARN, "not used", "address"),
        (doctor.gids(choose_rails([port()])[0], {})[0], State.OK, "GID 3 (RoCE v2, 10.1.2.3)", ""),
        (doctor.permission(port(), None), State.OK, "may be opened", ""),
        (doctor.permission(port(), "x is missing: docker run"), State.FAIL, "x is missing", "docker run"),
        (doctor.locked_memory(resource.RLIM_INFINITY), State.OK, "no limit", ""),
        (doctor.locked_memory(65536), State.WARN, "64 KiB", "ulimit -l unlimited"),
        (doctor.dma_buf("mlx5_0", None), State.OK, "taken", ""),
        (doctor.dma_buf("rxe0", "its driver takes no dma-bufs"), State.OK, "staged", ""),
    ],
)
def test_what_the_doctor_says(row: doctor.Row, state: State, words: str, remedy: str) -> None:
    assert row.state is state
    assert words in row.found
    assert remedy in row.remedy


def test_options_that_cannot_be_are_a_finding() -> None:
    (row,) = doctor.rows({"retries": 9})
    assert row.state is State.FAIL
    assert "retries" in row.found
