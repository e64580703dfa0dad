"""The simulation's own truth: who held which block when, and what every read really saw.

Nothing here looks at a lease table or at any other state of the protocol core. Holdings are recorded where the engines
allocate and free, what was read is recorded where bytes are copied, and what a ticket promised where it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pd_connector.plan import CopyPlan

Cell = tuple[int, int]
"""(grid, block): the smallest thing that is copied at once."""
Memory = Sequence[Sequence[int]]
"""Content by grid and block."""


class Violation(Exception):
    """The protocol broke a promise. ``kind`` tells different promises apart."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(slots=True, eq=False)
class Holding:
    """Blocks that one request of one engine holds, from allocation until it is freed (by ``freed``, a step)."""

    name: str
    blocks: tuple[int, ...]
    freed: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    source: Cell
    target: Cell


@dataclass(slots=True, eq=False)
class Watch:
    """One pull on one rank, as it really went. ``holding`` is what the ticket promised to hold: None when the ticket
    was falsified, then nothing of it may ever be used. ``wanted`` is all that a pull must have written when it is done,
    where its parts came one by one."""

    name: str
    parts: list[tuple[Piece, ...]]
    promised: dict[Cell, int]
    holding: Holding | None
    audited: bool = False
    wanted: set[Cell] = field(default_factory=set)
    outcome: str = ""
    confirmed: set[int] = field(default_factory=set)
    seen: dict[tuple[int, Piece], tuple[int, Holding | None]] = field(default_factory=dict)
    """When each piece of each part was copied from its source, and who held the source then."""


class Truth:
    def __init__(self) -> None:
        self.step = 0
        self._content = 0

    def tick(self) -> int:
        self.step += 1
        return self.step

    def new_content(self) -> int:
        """Content that was never anywhere before."""
        self._content += 1
        return self._content

    def free(self, holding: Holding) -> None:
        if holding.freed is not None:
            raise Violation("freed twice", holding.name)
        holding.freed = self.tick()

    def landed(self, watch: Watch, part: int, piece: Piece, seen: tuple[int, Holding | None]) -> None:
        """A piece was written to its destination."""
        if watch.outcome:
            raise Violation(
                "late write", f"{watch.name} ended {watch.outcome}, then its read wrote block {piece.target[1]}"
            )
        watch.seen[part, piece] = seen

    def confirmed(self, watch: Watch, part: int, memory: Memory) -> None:
        if watch.outcome or part in watch.confirmed:
            raise Violation("confirmed twice", f"part {part} of {watch.name}, which is {watch.outcome or 'running'}")
        watch.confirmed.add(part)
        self._check(watch, (part,), memory)

    def ended(self, watch: Watch, outcome: str, memory: Memory) -> None:
        if watch.outcome:
            raise Violation("ended twice", f"{watch.name} ended {watch.outcome}, then {outcome}")
        watch.outcome = outcome
        if outcome == "done":
            if missing := watch.wanted - {piece.target for part in watch.parts for piece in part}:
                raise Violation("not whole", f"{watch.name} is done without {sorted(missing)[:4]}")
            self._check(watch, range(len(watch.parts)), memory)

    def _check(self, watch: Watch, parts: Sequence[int], memory: Memory) -> None:
        """These parts are about to be computed on: their bytes must be the promised ones, and the owner must have held
        every source block for this very lease without a break until the last of them was read."""
        if watch.holding is None:
            raise Violation("forged ticket", f"{watch.name} was confirmed under a falsified ticket")
        last = 0
        for part in parts:
            for piece in watch.parts[part]:
                if (part, piece) not in watch.seen:
                    raise Violation("not read", f"{watch.name} part {part} was confirmed before {piece} was read")
                step, holder = watch.seen[part, piece]
                last = max(last, step)
                if holder is not watch.holding:
                    name = holder.name if holder else "nobody"
                    raise Violation("not held", f"{watch.name} read block {piece.source[1]} while {name} held it")
                grid, block = piece.target
                if memory[grid][block] != watch.promised[piece.source]:
                    raise Violation("wrong bytes", f"{watch.name} part {part}: block {block} of grid {grid}")
        if watch.holding.freed is not None and watch.holding.freed <= last:
            raise Violation("not held", f"{watch.name} read on after {watch.holding.name} was freed")


def pieces_of(plan: CopyPlan) -> Iterator[Piece]:
    for pattern in plan.patterns:
        for source, target, count in plan.runs.tolist():
            for n in range(count):
                yield Piece((pattern.src_grid, source + n), (pattern.dst_grid, target + n))
