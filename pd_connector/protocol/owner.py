"""The owner's half of the core: grants leases, answers readers from the lease table, ends leases exactly once."""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction

import numpy as np

from pd_connector.errors import LocalProtocolError
from pd_connector.protocol.audit import audit_problem, first_difference, sides_of
from pd_connector.protocol.context import Context
from pd_connector.protocol.events import (
    DigestBlocks,
    Digested,
    Extend,
    Grant,
    GrantBlocks,
    Grow,
    LeaseEnded,
    LeaseRenewed,
    RevokeBlocks,
)
from pd_connector.protocol.followers import Followers
from pd_connector.protocol.lease import Answer, Asked, Lease, LeaseInput, LeaseState, LeaseTable, Unknown
from pd_connector.protocol.messages import (
    DIGEST_BYTES,
    MAX_WORDS,
    VERSION,
    Bye,
    Commit,
    Hello,
    Open,
    Opened,
    Refused,
    Release,
    Renew,
    Renewed,
    Renounce,
    Verdict,
    Welcome,
)
from pd_connector.protocol.promises import RENOUNCED, Promises

LeaseRequest = Open | Commit | Renew | Release


class Owner:
    def __init__(self, context: Context) -> None:
        limits = context.limits
        self._context = context
        self._guests: OrderedDict[str, int] = OrderedDict()
        self._parked: OrderedDict[int, tuple[str, LeaseRequest]] = OrderedDict()
        self._jobs: dict[int, tuple[str, Commit, Lease]] = {}
        self._followers = Followers(context)
        self.promises = Promises(context)
        self.table = LeaseTable(
            max_leases=limits.max_leases, remember_seconds=limits.remember, max_remembered=limits.max_remembered
        )

    # --- local calls --------------------------------------------------------------------------------------------------

    def grant(self, event: Grant, now: float) -> None:
        if self._context.draining:
            raise LocalProtocolError(f"lease {event.number}: this agent is draining and grants nothing new")
        if event.readers < 1 or event.seconds <= 0:
            raise LocalProtocolError(f"lease {event.number}: needs at least one reader and a positive time")
        if (why_not := self.table.why_not(event.number, event.epoch)) is not None:
            raise LocalProtocolError(why_not)
        lease = Lease(
            number=event.number,
            epoch=event.epoch,
            capability=event.capability,
            blocks=event.blocks,
            readers=event.readers,
            seconds=event.seconds,
            deadline=now + min(event.seconds, event.cap_seconds),
            cap=now + event.cap_seconds,
            terms=event.terms,
            promise=event.promise,
            growing=event.growing,
        )
        self.table.grant(lease)
        self._context.counters["leases_granted"] += 1
        self._context.timers.set(("lease", lease.number), lease.deadline)
        self._context.emit(GrantBlocks(event.number, event.epoch, event.capability, event.blocks))
        if why := self.promises.granted(lease):
            self.end(event.number, why, now)
        self._unpark(event.number, now)

    def grow(self, event: Grow) -> None:
        """Late for a lease that has ended, of which the followers know."""
        lease = self.table.get(event.number)
        if lease is None:
            self._context.counters["late_events"] += 1
            return
        if not lease.growing or lease.complete:
            raise LocalProtocolError(f"lease {event.number} does not grow (any more)")
        others = any(
            not np.array_equal(np.asarray(event.blocks.get(group, ()))[: len(ids)], ids)
            for group, ids in lease.blocks.items()
        )
        if others or any(now < then for now, then in zip(event.tokens, lease.tokens, strict=False)):
            raise LocalProtocolError(f"lease {event.number}: blocks and tokens of a lease that grows are only added")
        lease.blocks, lease.tokens, lease.complete = event.blocks, event.tokens, event.complete
        lease.terms = event.terms
        self._context.emit(GrantBlocks(lease.number, lease.epoch, lease.capability, lease.blocks))
        self._followers.tell(lease)

    def end(self, number: int, reason: str, now: float, again: bool = False) -> None:
        lease = self.table.get(number)
        if lease is None and not again and self.table.comes_again(number):
            self.table.end_for_good(number, reason, now)
            self._unpark(number, now)
        elif lease is None:
            self._context.counters["late_events"] += 1
        elif lease.step(LeaseInput.TAKEN_BACK, reason):
            lease.again = again
            self._finish(lease, now)

    def renounce(self, message: Renounce, now: float) -> None:
        lease = self.promises.renounce(message, now)
        if lease is not None:
            self.end(lease.number, RENOUNCED, now)

    def extend(self, event: Extend, now: float) -> None:
        if (lease := self.table.get(event.number)) is not None:
            self._renew(lease, now)

    def close(self, now: float) -> None:
        for lease in self.table.all():
            self.end(lease.number, "the owner closed", now)
        for route, incarnation in self._guests.items():
            self._context.send(route, Bye(src=self._context.incarnation, dst=incarnation))
        self._guests.clear()
        self._parked.clear()
        self.promises.close()

    # --- messages -----------------------------------------------------------------------------------------------------

    def hello(self, route: str, message: Hello) -> None:
        me = self._context.identity
        diff = self._context.refusal(message.version, VERSION, message.model, message.layout)
        self._guests[route] = message.src
        self._guests.move_to_end(route)
        if len(self._guests) > self._context.limits.max_guests:
            self._guests.popitem(last=False)  # it only loses the courtesy of a Bye
        self._context.counters["hellos_refused" if diff else "hellos"] += 1
        self._context.send(
            route,
            Welcome(
                src=me.incarnation,
                dst=message.src,
                version=VERSION,
                agent=me.agent,
                model=me.model,
                layout=me.layout,
                transports=me.transports,
                # The reader's words about us read the other way round; it computes its own diff, this one is for a
                # reader of an older version that would not.
                refused="; ".join(diff)[:MAX_WORDS],
                directory=me.directory,
            ),
        )

    def request(self, route: str, message: LeaseRequest, now: float) -> None:
        if isinstance(message, Commit) and (answer := self.table.recall(_asked(message))):
            self._context.counters["commits_repeated"] += 1
            self._verdict(route, message, answer)
            return
        found = self.table.find(message.lease, message.epoch, message.capability)
        if found is Unknown.NOT_YET:
            self._park(route, message, now)
        elif isinstance(found, Lease):
            self._held(route, message, found, now)
        else:
            self._not_held(route, message)

    def _held(self, route: str, message: LeaseRequest, lease: Lease, now: float) -> None:
        me = self._context.incarnation
        told = lease.growing and not message.terms if isinstance(message, Open | Commit) else True
        if isinstance(message, Open | Commit) and message.terms != lease.terms and not told:
            self._context.counters["terms_mismatched"] += 1
            reason = "the ticket was changed on its way: its blocks, tokens or key are not those of the lease"
            self._not_held(route, message, reason)
            return
        if isinstance(message, Commit):
            self._commit(route, message, lease, now)
            return
        if isinstance(message, Release):
            reader_done = bool(message.reader)
            if not reader_done and lease.step(LeaseInput.TAKEN_BACK, RENOUNCED):
                self._finish(lease, now)
            elif reader_done:
                self._reader_done(lease, message, f"released by {message.reader}", now)
            return
        self._renew(lease, now)
        left = int((lease.deadline - now) * 1000)
        if isinstance(message, Open):
            answer = Opened(src=me, dst=message.src, transfer=message.transfer, held=True, remaining_ms=left)
            self._context.send(route, answer)
            if message.follow and not (lease.growing and self._followers.add(route, message, lease)):
                self._refuse(
                    route, message, f"lease {lease.number} cannot be followed: it does not grow, or too many do"
                )
        else:
            self._context.notify(LeaseRenewed(lease.number, lease.epoch))
            self._context.send(
                route,
                Renewed(src=me, dst=message.src, lease=lease.number, epoch=lease.epoch, held=True, remaining_ms=left),
            )

    def _not_held(self, route: str, message: LeaseRequest, reason: str = "") -> None:
        me = self._context.incarnation
        reason = f"lease {message.lease} is not held: {reason or self.table.reason_of(message.lease)}"[:MAX_WORDS]
        if isinstance(message, Commit):
            self._context.counters["commits_not_held"] += 1
            self._verdict(route, message, Answer(False, reason))
        elif isinstance(message, Open):
            again = self.table.comes_again(message.lease)
            self._context.send(
                route,
                Opened(src=me, dst=message.src, transfer=message.transfer, held=False, reason=reason, again=again),
            )
        elif isinstance(message, Renew):
            self._context.send(
                route, Renewed(src=me, dst=message.src, lease=message.lease, epoch=message.epoch, held=False)
            )

    # --- verdicts -----------------------------------------------------------------------------------------------------

    def _commit(self, route: str, message: Commit, lease: Lease, now: float) -> None:
        if message.audit is None:
            self._decide(route, message, lease, Answer(True), now)
            return
        if any(_asked(m) == _asked(message) for _, m, _ in self._jobs.values()):
            return  # a repeat while the digests of the first one are still being computed
        problem = self._audit_problem(message, lease)
        if problem:
            self._verdict(route, message, Answer(False, problem))
            return
        job = self._context.new_id()
        self._jobs[job] = (route, message, lease)
        self._renew(lease, now)
        self._context.emit(DigestBlocks(job, sides_of(message.audit)))

    def _audit_problem(self, message: Commit, lease: Lease) -> str:
        audit, layout = message.audit, self._context.identity.layout
        assert audit is not None
        if len(self._jobs) >= self._context.limits.max_digest_jobs:
            return "audit: too many digests are being computed here (max_digest_jobs)"
        if layout is None:
            return "audit: there is no memory here"
        return audit_problem(audit, layout, lease.blocks)

    def digested(self, event: Digested, now: float) -> None:
        job = self._jobs.pop(event.job, None)
        if job is None:
            self._context.counters["late_events"] += 1
            return
        route, message, lease = job
        assert message.audit is not None
        compared = len(message.audit.digests) // DIGEST_BYTES
        if event.digests is None:
            self._verdict(route, message, Answer(False, "audit: the owner could not digest its blocks"))
        elif lease.state is not LeaseState.HELD:
            # The bytes that were digested may not be the leased ones any more.
            self._not_held(route, message)
        elif event.digests != message.audit.digests:
            self._context.counters["audit_mismatches"] += 1
            where = first_difference(event.digests, message.audit)
            self._decide(route, message, lease, Answer(False, f"audit: {where}", compared), now)
        else:
            self._decide(route, message, lease, Answer(True, "", compared), now)

    def _decide(self, route: str, message: Commit, lease: Lease, answer: Answer, now: float) -> None:
        self.table.remember(_asked(message), answer, now)
        self._context.counters["commits_held" if answer.held else "commits_not_held"] += 1
        self._verdict(route, message, answer)
        if message.final:
            self._reader_done(lease, message, "every reader has its blocks", now)
        else:
            self._renew(lease, now)

    def _verdict(self, route: str, message: Commit, answer: Answer) -> None:
        self._context.send(
            route,
            Verdict(
                src=self._context.incarnation,
                dst=message.src,
                transfer=message.transfer,
                part=message.part,
                held=answer.held,
                reason=answer.reason,
                compared=answer.compared,
                again=not answer.held and self.table.comes_again(message.lease),
            ),
        )

    # --- lease ends ---------------------------------------------------------------------------------------------------

    def expire(self, number: int, now: float) -> None:
        lease = self.table.get(number)
        if lease is not None and lease.step(LeaseInput.EXPIRED, "it expired"):
            self._context.counters["leases_expired"] += 1
            self._finish(lease, now)

    def _reader_done(self, lease: Lease, message: Commit | Release, reason: str, now: float) -> None:
        """A lease is for so many instances; how many ranks of each read here, the ranks say."""
        self._followers.left(lease, message)
        lease.done[message.reader] = Fraction(1, message.readers)
        over = sum(lease.done.values()) >= lease.readers
        what = LeaseInput.LAST_READER_DONE if over else LeaseInput.READER_DONE
        if lease.step(what, reason):
            self._finish(lease, now)

    def _renew(self, lease: Lease, now: float) -> None:
        lease.step(LeaseInput.RENEWED)
        lease.deadline = max(lease.deadline, min(now + lease.seconds, lease.cap))
        self._context.timers.set(("lease", lease.number), lease.deadline)

    def _finish(self, lease: Lease, now: float) -> None:
        self.table.end(lease, now)
        self._context.timers.cancel(("lease", lease.number))
        self._context.emit(RevokeBlocks(lease.number, lease.epoch))
        self._followers.ended(lease)
        self.promises.ended(lease, now)
        self._context.notify(LeaseEnded(lease.number, lease.epoch, lease.reason))

    # --- requests that came before their grant ------------------------------------------------------------------------

    def _park(self, route: str, message: LeaseRequest, now: float) -> None:
        if any(known == message for _, known in self._parked.values()):
            return  # a repeat
        if len(self._parked) >= self._context.limits.max_parked:
            self._context.counters["parked_refused"] += 1
            if isinstance(message, Open | Commit):
                reason = f"{len(self._parked)} requests for ungranted leases wait here already (max_parked)"
                self._refuse(route, message, reason)
            return
        ticket = self._context.new_id()
        self._parked[ticket] = (route, message)
        self._context.timers.set(("parked", ticket), now + self._context.limits.park)

    def _refuse(self, route: str, message: Open | Commit, reason: str) -> None:
        me = self._context.incarnation
        self._context.send(route, Refused(src=me, dst=message.src, transfer=message.transfer, reason=reason))

    def _unpark(self, number: int, now: float) -> None:
        for ticket in [t for t, (_, message) in self._parked.items() if message.lease == number]:
            route, message = self._parked.pop(ticket)
            self._context.timers.cancel(("parked", ticket))
            self.request(route, message, now)

    def give_up_parked(self, ticket: int) -> None:
        route, message = self._parked.pop(ticket, ("", None))
        # A follower asks again by itself, for as long as it wants to wait.
        if message is not None and not (isinstance(message, Open) and message.follow):
            self._not_held(route, message)


def _asked(message: Commit) -> Asked:
    m = message
    return (m.src, m.transfer, m.part, m.lease, m.epoch, m.capability, m.terms)
