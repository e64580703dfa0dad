"""What a 64-bit little-endian ELF library asks of others: a reader of a few tables, so that no tool is needed."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_DYNAMIC, _DYNSYM = 6, 11
_NEEDED = 1


@dataclass(frozen=True)
class Asked:
    libraries: tuple[str, ...]
    symbols: frozenset[str]
    """Undefined dynamic symbols: the loader must find each of them elsewhere, unless it is weak."""


@dataclass(frozen=True)
class _Section:
    type: int
    offset: int
    size: int
    link: int


def asked(path: Path) -> Asked:
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is no such library"
    (at,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [_section(data, at + index * size) for index in range(count)]

    def string(table: int, offset: int) -> str:
        start = sections[table].offset + offset
        return data[start : data.index(b"\0", start)].decode()

    libraries, symbols = [], set()
    for section in sections:
        if section.type == _DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[section.offset : section.offset + section.size]):
                if tag == _NEEDED:
                    libraries.append(string(section.link, value))
        if section.type == _DYNSYM:
            rows = struct.iter_unpack("<IBBHQQ", data[section.offset : section.offset + section.size])
            symbols |= {string(section.link, name) for name, _, _, index, _, _ in rows if index == 0 and name}
    return Asked(tuple(libraries), frozenset(symbols))


def _section(data: bytes, at: int) -> _Section:
    _, kind, _, _, offset, size, link, _, _, _ = struct.unpack_from("<IIQQQQIIQQ", data, at)
    return _Section(kind, offset, size, link)
