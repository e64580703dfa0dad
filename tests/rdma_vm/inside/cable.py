"""What goes over a guest's cable: RoCE's own headers, as the kernel hands copies of its packets out."""

from __future__ import annotations

import socket
import struct
from collections import Counter

_ALL = 3  # ETH_P_ALL
_ROCE_PORT = 4791
_SO_RCVBUFFORCE = 33
_ROOM = 256 << 20
_ASK, _LAST, _ONLY = 0x0C, 0x0F, 0x10  # reliable connected: RDMA READ request; the last, or only, packet of its answer
_IP, _UDP, _BASE = 14, 34, 42  # where the headers start


class Cable:
    """Listens while it is entered; the packets lie in the socket until ``reads``."""

    def __init__(self, device: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        self._socket.bind((device, _ALL))
        self._packets: list[bytes] = []

    def __enter__(self) -> Cable:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.setblocking(False)
        try:
            while True:
                self._packets.append(self._socket.recv(64))
        except BlockingIOError:
            self._socket.close()

    def reads(self) -> tuple[int, int]:
        """READ requests (those sent again count once), and how many of a queue pair were unanswered at once."""
        asked: set[tuple[int, int]] = set()
        waiting: Counter[bytes] = Counter()  # by the two addresses' order: one queue pair on each side
        most = 0
        for packet in self._packets:
            if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_UDP:
                continue
            if struct.unpack_from(">H", packet, _UDP + 2)[0] != _ROCE_PORT:
                continue
            operation, pair = packet[_BASE], int.from_bytes(packet[_BASE + 5 : _BASE + 8])
            number = int.from_bytes(packet[_BASE + 9 : _BASE + 12])
            source, target = packet[_IP + 12 : _IP + 16], packet[_IP + 16 : _IP + 20]
            if operation == _ASK and (pair, number) not in asked:
                asked.add((pair, number))
                waiting[source + target] += 1
                most = max(most, waiting[source + target])
            elif operation in (_LAST, _ONLY):
                waiting[target + source] -= 1
        return len(asked), most
