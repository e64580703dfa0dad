"""Reading our own documents: sections, tables, command blocks; and what a message field looks like in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec.inspect as mi

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README_zh.md")


def pages() -> list[Path]:
    return [*(ROOT / name for name in (*READMES, "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands below one heading, up to the next one of any level."""
    parts = re.split(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    found = [body for title, body in zip(parts[1::2], parts[2::2], strict=True) if title.strip() == heading]
    assert len(found) == 1, f"{len(found)} headings {heading!r}"
    return found[0]


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every table as a list of rows: column heading → cell, both without backticks."""
    out = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        head, rule, rows = lines[0], lines[1], lines[2:]
        assert all(re.fullmatch(r":?-+:?", cell) for cell in rule), f"no table: {block[:80]}"
        assert all(len(row) == len(head) for row in rows), f"uneven rows: {block[:80]}"
        out.append([{h: cell.replace("`", "") for h, cell in zip(head, row, strict=True)} for row in rows])
    return out


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The one table of a section."""
    found = tables(section(text, heading))
    assert len(found) == 1, f"{len(found)} tables under {heading!r}"
    return found[0]


def first_column(rows: list[dict[str, str]]) -> list[str]:
    return [next(iter(row.values())) for row in rows]


@dataclass(frozen=True)
class Command:
    page: str
    text: str


def commands() -> list[Command]:
    """Every command in a bash block; a console block shows output too, its commands start with "$ "."""
    out = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for language, body in re.findall(r"^ *```(bash|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
            lines = [line.strip() for line in re.sub(r" *\\\n\s*", " ", body).splitlines()]
            if language == "console":
                lines = [line[2:] for line in lines if line.startswith("$ ")]
            out += [Command(page.relative_to(ROOT).as_posix(), text) for text in _whole(lines)]
    return out


def _whole(lines: list[str]) -> Iterator[str]:
    """Lines joined where a quoted string goes on in the next one."""
    text = ""
    for line in filter(None, lines):
        text = f"{text} {line}".strip()
        if text.count("'") % 2 == 0:
            yield text
            text = ""
    assert not text, f"a quote is never closed: {text}"


def fields(struct: type, leave_out: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """The rows that a document's table of a struct's fields must have, without their meaning."""
    info = mi.type_info(struct)
    assert isinstance(info, mi.StructType)
    rows = []
    for field in info.fields:
        if field.encode_name not in leave_out:
            kind, bound = _words(field.type)
            default = "required" if field.required else _default(field.default)
            rows.append({"Field": field.encode_name, "Type": kind, "Bound": bound or "–", "Default": default})
    return rows


def _words(kind: Any) -> tuple[str, str]:
    match kind:
        case mi.IntType(ge=low, le=high):
            # MessagePack itself has no others.
            first, last = "-2^63" if low is None else str(low), _number(2**64 - 1 if high is None else high)
            return "integer", f"{first}..{last}"
        case mi.StrType():
            return "string", _length(kind, "characters")
        case mi.BytesType():
            return "bytes", _length(kind, "bytes")
        case mi.BoolType():
            return "boolean", ""
        case mi.EnumType(cls=cls):
            return "integer", ", ".join(str(int(member)) for member in cls)
        case mi.StructType(cls=cls):
            return cls.__name__, ""
        case mi.VarTupleType(item_type=item):
            inner, bound = _words(item)
            return f"array of {inner}", "; ".join(filter(None, (_length(kind, "items"), bound and f"each {bound}")))
        case mi.TupleType(item_types=items):
            inner = [_words(item) for item in items]
            return f"[{', '.join(k for k, _ in inner)}]", f"[{', '.join(b for _, b in inner)}]"
        case mi.DictType(key_type=key, value_type=value):
            (k, keys), (v, values) = _words(key), _words(value)
            return f"map of {k} to {v}", f"{_length(kind, 'entries')}; keys {keys}; values {values}"
        case mi.UnionType(types=types):
            named = [_words(each) for each in types if not isinstance(each, mi.NoneType)]
            nil = ["nil"] if len(named) < len(types) else []
            return " or ".join([inner for inner, _ in named] + nil), "; ".join(filter(None, (b for _, b in named)))
    raise AssertionError(f"no words for {kind}")


def _length(kind: Any, unit: str) -> str:
    low, high = kind.min_length or 0, kind.max_length
    assert high is not None, f"{kind} has no bound"
    if low == high:
        return f"{high} {unit}"
    return f"{low}..{_number(high)} {unit}" if low else f"≤ {_number(high)} {unit}"


def _number(n: int) -> str:
    if n >= 1024 and not n & (n - 1):
        return f"2^{n.bit_length() - 1}"
    if n >= 1023 and not n & (n + 1):
        return f"2^{n.bit_length()}-1"
    return str(n)


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return {None: "nil", "": '""', b"": "empty", (): "[]"}.get(value, str(value))
