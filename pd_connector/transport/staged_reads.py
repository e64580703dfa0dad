"""What the reader of a staged transport knows of its peers, their reads and the slices on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import zmq

from pd_connector.plan import CopyPlan
from pd_connector.transport.base import LeaseId, PeerId, Status
from pd_connector.transport.device import Device
from pd_connector.transport.device_memory import DeviceMemory
from pd_connector.transport.mover import Job
from pd_connector.transport.slices import Slice
from pd_connector.transport.staged_wire import Filled, Where


class Stage(Enum):
    ASKED = "asked"
    FILLED = "filled"  # a slot of the owner's holds it; ours may have to be waited for
    READ = "read"  # it is here, or will not come, and the owner's slot was given back


@dataclass(slots=True, eq=False)
class Read:
    tag: int
    peer: PeerId
    lease: LeaseId
    capability: bytes
    priority: int
    memory: DeviceMemory  # what the plan was checked against, whatever is registered by now
    device: Device
    plan: CopyPlan
    slices: Iterator[Slice]
    left: int  # bytes that do not count yet
    pieces: set[Piece] = field(default_factory=set)
    moving: int = 0  # moves of the device that were started and have not been reported
    ending: tuple[Status, str] | None = None


@dataclass(slots=True, eq=False)
class Piece:
    serial: int
    read: Read
    slice: Slice
    link: Link
    stage: Stage = Stage.ASKED
    filled: Filled | None = None
    slot: int | None = None  # of ours
    inner_tag: int | None = None
    deadline: float = 0.0
    job: Job | None = None
    failure: tuple[Status, str] | None = None  # of the read over inner
    held: bool = False
    moved: bool = False


@dataclass(slots=True, eq=False)
class Link:
    """One connection. It is thrown away, never revived: answers of an old one cannot reach a new one."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    nonce: bytes
    open: bool = True
    next_serial: int = 0
    pending: dict[int, Piece] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Peer:
    id: PeerId
    where: Where
    inner_name: PeerId
    most_bytes: int  # of a slice
    link: Link | None = None
    connect_tag: int | None = None
    greeted: bool = False
    inner_connected: bool = False
    queues: dict[int, deque[Read]] = field(default_factory=dict)  # per priority, reads that have slices to ask for
