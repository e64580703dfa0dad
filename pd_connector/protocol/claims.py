"""The messages by which a transfer claims its lease: what each says of it. Pure."""

from __future__ import annotations

from pd_connector.protocol.context import Identity
from pd_connector.protocol.messages import Audit, AuditPlan, Commit, Open, Release, Renew
from pd_connector.protocol.ticket import Ticket
from pd_connector.protocol.transfer import Transfer


def open_of(transfer: Transfer, me: Identity) -> Open:
    pull = transfer.pull
    ticket = pull.ticket
    return Open(
        src=me.incarnation,
        dst=transfer.incarnation,
        transfer=pull.transfer,
        lease=ticket.lease,
        epoch=ticket.epoch,
        capability=ticket.capability,
        reader=me.agent,
        transport=transfer.transport,
        readers=pull.readers,
        terms=pull.terms,
        follow=pull.follow,
    )


def commit_of(transfer: Transfer, part: int, me: Identity) -> Commit:
    pull, audit = transfer.pull, None
    ticket = pull.ticket
    if pull.audit:
        sides = [plan.side(0) for plan in transfer.plans[part] if plan.num_blocks]
        plans = tuple(AuditPlan(blocks.astype("<u4").tobytes(), places) for blocks, places in sides)
        audit = Audit(plans, transfer.digests[part])
    return Commit(
        src=me.incarnation,
        dst=transfer.incarnation,
        transfer=pull.transfer,
        part=part,
        lease=ticket.lease,
        epoch=ticket.epoch,
        capability=ticket.capability,
        reader=me.agent,
        final=part == transfer.last,
        readers=pull.readers,
        audit=audit if audit is None or audit.digests else None,
        terms=pull.terms,
    )


def release_of(ticket: Ticket, source: int, reader: str, readers: int, destination: int | None = None) -> Release:
    """By ``reader`` of ``readers``; to another incarnation than the ticket's where its owner only speaks for ranks."""
    return Release(
        src=source,
        dst=ticket.incarnation if destination is None else destination,
        lease=ticket.lease,
        epoch=ticket.epoch,
        capability=ticket.capability,
        reader=reader,
        readers=readers,
    )


def renew_of(ticket: Ticket, source: int, destination: int | None = None) -> Renew:
    return Renew(
        src=source,
        dst=ticket.incarnation if destination is None else destination,
        lease=ticket.lease,
        epoch=ticket.epoch,
        capability=ticket.capability,
    )
