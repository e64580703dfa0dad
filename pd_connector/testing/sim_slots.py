"""The staging slots of a simulated owner: the product's own table of them, and what really lies in each.

Both the filling of a slot and the reading of it are torn over many steps, and a reader takes what lies there, whoever
put it there: only the table decides whether that counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pd_connector.testing.sim_truth import Holding, Piece, Violation
from pd_connector.transport.base import LeaseId
from pd_connector.transport.staging import Loan, SlotTable, Verdict

if TYPE_CHECKING:
    from pd_connector.testing.sim_data import Data, ReadJob
    from pd_connector.testing.sim_node import Node

WAIT_S = 60.0

Staged = tuple[int, tuple[int, Holding | None]]
"""A content, and when it was copied from its block and in whose hands that was."""


@dataclass(slots=True, eq=False)
class Fill:
    """Pieces that a read wants in a slot; ``reader`` is told of what becomes of it."""

    reader: Data
    job: ReadJob
    pieces: list[Piece]
    samples: list[Staged] = field(default_factory=list)
    """What was read from the slot so far."""


class Staging:
    def __init__(self, node: Node) -> None:
        rules = node.world.script.rules
        self.node = node
        self.table: SlotTable[Fill] = SlotTable(max(1, rules.slots), rules.slot_hold, WAIT_S)
        self.content: list[dict[int, Staged]] = [{} for _ in range(rules.slots)]
        self._open: set[Fill] = set()

    def ask(self, fill: Fill) -> None:
        """A read wants a slot filled."""
        command = fill.job.command
        who, lease, now = fill.reader.node, LeaseId(command.number, command.epoch), self.node.world.now
        if not self.table.ask((who.name, who.boot), lease, fill, now):
            fill.reader.refused(fill, "error")
            return
        self._open.add(fill)
        self.node.world.at(now + WAIT_S + 1e-9, self._expire)
        self._lend()

    def read(self, loan: Loan[Fill], index: int) -> Staged:
        """What lies in a slot now, at the place of a piece; anything where nothing was put."""
        return self.content[loan.slot].get(index) or (self.node.world.truth.new_content(), (0, None))

    def give_back(self, loan: Loan[Fill]) -> Verdict:
        self._open.discard(loan.request)
        verdict = self.table.give_back(loan.reader, loan.slot, loan.epoch)
        self.node.world.count(f"slots {verdict.value}")
        self._lend()
        return verdict

    def revoke(self, lease: LeaseId) -> None:
        self.table.revoke(lease)
        self._lend()

    def die(self) -> None:
        """Whoever waits for this owner's answer finds its connection broken."""
        for fill in self._open:
            fill.reader.again(fill)
        self._open.clear()

    def check_idle(self) -> None:
        if self.table.num_free != max(1, len(self.content)):
            raise Violation("leftovers", f"{self.node.name}: {self.table.num_free} of its slots are free")

    def _lend(self) -> None:
        while (loan := self.table.lend()) is not None:
            if self._may(loan):
                loan.request.reader.soon(loan.request.job, self._copy, loan, 0)

    def _may(self, loan: Loan[Fill]) -> bool:
        """Whether the block lease is held; otherwise the loan is over."""
        fill = loan.request
        if self.node.data.serves(fill.job, fill.pieces):
            return True
        self.table.drop(loan)
        self._refuse(fill, "not_granted")
        return False

    def _copy(self, loan: Loan[Fill], index: int) -> None:
        if self.node.dead:
            return
        fill, world = loan.request, self.node.world
        grid, block = fill.pieces[index].source
        seen = (world.truth.tick(), self.node.engine.holder[block])
        self.content[loan.slot][index] = (self.node.memory[grid][block], seen)
        done = index + 1 == len(fill.pieces)
        fill.reader.soon(fill.job, *((self._filled, loan) if done else (self._copy, loan, index + 1)))

    def _filled(self, loan: Loan[Fill]) -> None:
        if self.node.dead:
            return
        fill, world = loan.request, self.node.world
        if not self._may(loan):
            self._lend()
        elif self.table.filled(loan, world.now):
            world.at(world.now + world.script.rules.slot_hold + 1e-9, self._expire)
            fill.reader.soon(fill.job, fill.reader.read_slot, fill, self.node, loan)
            self._lend()
        else:
            self._refuse(fill, "not_granted")
            self._lend()

    def _expire(self) -> None:
        if self.node.dead:
            return
        late, waited = self.table.expire(self.node.world.now)
        self.node.world.counts["slots expired"] += len(late)
        for _, fill in waited:
            self._refuse(fill, "error")
        self._lend()

    def _refuse(self, fill: Fill, status: str) -> None:
        self._open.discard(fill)
        fill.reader.refused(fill, status)
