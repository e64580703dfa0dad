"""Our kernel as its text in csrc/cuda_gather.h, and an interpreter of the few instructions it is made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "cuda_gather.h"
BYTES = {"u8": 1, "u32": 4, "b32": 4, "u64": 8, "b64": 8}
MAX_STEPS = 1_000_000
_VERBS: dict[str, Callable[[int, int, int], int]] = {
    "mov": lambda a, b, c: a,
    "cvt": lambda a, b, c: a,
    "cvta": lambda a, b, c: a,
    "add": lambda a, b, c: a + b,
    "mul": lambda a, b, c: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b, c: a & b,
    "or": lambda a, b, c: a | b,
    "shl": lambda a, b, c: a << b,
    "shr": lambda a, b, c: a >> b,
}


def kernel() -> str:
    return "".join(line + "\n" for line in re.findall(r'^    "(.*)\\n"', HEADER.read_text(), re.MULTILINE))


@dataclass
class Machine:
    """Runs one thread after the other: the kernel's threads do not wait for each other. ``memory`` begins at ``base``;
    an access that is outside of it, or not aligned as a GPU demands, is an error."""

    memory: bytearray
    base: int
    used: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        body = kernel().partition("{")[2].rpartition("}")[0]
        self.code: list[tuple[str, list[str]]] = []
        self.labels: dict[str, int] = {}
        for line in body.split("\n"):
            line = line.strip()
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line and not line.startswith(".reg"):
                name, _, rest = line.rstrip(";").partition(" ")
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", rest)
                self.code.append((name, operands))

    def launch(self, at: int, count: int, blocks: int, threads: int) -> None:
        for block in range(blocks):
            for thread in range(threads):
                special = {"%tid.x": thread, "%ntid.x": threads, "%ctaid.x": block, "%nctaid.x": blocks}
                self._run(special, {"at": at, "count": count})

    def _run(self, registers: dict[str, int], parameters: dict[str, int]) -> None:
        place = 0
        for _ in range(MAX_STEPS):
            name, operands = self.code[place]
            place += 1
            if name.startswith("@"):
                if not registers[name[1:]]:
                    continue
                name, operands = operands[0], operands[1:]
            if name == "ret":
                return
            if name == "bra":
                place = self.labels[operands[0]]
                continue
            if name == "ld.param.u64":
                registers[operands[0]] = parameters[operands[1].strip("[]")]
            elif name.startswith(("ld.global", "st.global")):
                self._access(name, operands, registers)
            else:
                self._compute(name, operands, registers)
        raise AssertionError("the kernel does not end")

    def _access(self, name: str, operands: list[str], registers: dict[str, int]) -> None:
        verb, _, *vector, kind = name.split(".")
        target = operands[0 if verb == "st" else 1].strip("[]")
        values = operands[1 if verb == "st" else 0].strip("{}").replace(" ", "").split(",")
        assert len(values) == (4 if vector else 1)
        size = BYTES[kind]
        register, _, more = target.partition("+")
        address = registers[register] + int(more or 0)
        assert address % (size * len(values)) == 0, f"{name} at {address:#x} is not aligned"
        start = address - self.base
        assert 0 <= start <= len(self.memory) - size * len(values), f"{name} at {address:#x} is outside"
        self.used[name] += 1
        for index, each in enumerate(values):
            part = slice(start + index * size, start + (index + 1) * size)
            if verb == "st":
                self.memory[part] = (registers[each] % 256**size).to_bytes(size, "little")
            else:
                registers[each] = int.from_bytes(self.memory[part], "little")

    def _compute(self, name: str, operands: list[str], registers: dict[str, int]) -> None:
        into, *rest = operands
        values = [registers[each] if each.startswith("%") else int(each) for each in rest]
        verb, *_, kind = name.split(".")
        a, b, c = (*values, 0, 0)[:3]
        if verb == "setp":
            registers[into] = int(a >= b if ".ge." in name else a != b)
            return
        registers[into] = _VERBS[verb](a, b, c) % 256 ** BYTES[kind]
