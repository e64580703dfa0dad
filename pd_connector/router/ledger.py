"""Where the time to a first token went, from what the router and both instances stamped. Pure.

Each stage lies between two stamps of its own; none is what the others leave over. What a stage hides behind an earlier
one (in a streamed hand-over D reads while P computes) does not count again, so all of them and ``unaccounted`` add up
to the time that the client waited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import asdict, replace

from pd_connector.protocol.messages import Account, DecodeTimes, PrefillTimes

STAGES = ("router", "retries", "turn", "p_queue", "prefill", "announce", "wire", "commit", "d_queue", "first_token")
"""router: its own work. retries: attempts that failed. turn: waiting for what the last turn leaves. p_queue: from the
router's sending until P schedules the prompt. prefill: until its last forward has ended. announce: until D's engine
knows of the last blocks. d_queue: until D has blocks for them, and after the load until it schedules the request. wire:
reading. commit: P's verdict. first_token: D's step, and the way of its answer to the router (not streamed: the whole
answer)."""

Span = tuple[str, int, int]
"""(stage, from, to): stamps in ns."""


@dataclass(slots=True)
class Legs:
    """The router's own stamps (0: it did not come to that), of the attempt that served and of when the first began."""

    arrived: int
    clock: str
    began: int = 0
    attempt: int = 0
    turn_sought: int = 0
    turn_found: int = 0
    prefill_sent: int = 0
    prefill_answered: int = 0
    decode_sent: int = 0
    first_token: int = 0
    streamed: bool = False

    def begin(self, now: int) -> None:
        """One more attempt."""
        self.began = self.began or now
        self.attempt = now
        self.turn_sought = self.turn_found = self.prefill_sent = self.prefill_answered = self.decode_sent = 0


@dataclass(frozen=True, slots=True)
class Ledger:
    """Seconds. ``reading`` is all of D's reading, also what was hidden. ``tokens`` of the prompt: how many there were,
    D had already, should have been loaded, were, and how many P had from an earlier turn. ``missing`` names whose
    stamps are not in it, ``other_clocks`` whose were of another host: these are put where its request was sent, so its
    way there counts as what follows it."""

    wall: float
    stages: Mapping[str, float]
    unaccounted: float
    reading: float
    tokens: Mapping[str, int]
    missing: tuple[str, ...] = ()
    other_clocks: tuple[str, ...] = ()
    spans: tuple[Span, ...] = field(default=(), repr=False)

    def plain(self) -> dict[str, Any]:
        """As JSON, in milliseconds."""
        stages = {stage: round(seconds * 1e3, 3) for stage, seconds in self.stages.items()}
        return {
            "ttft_ms": round(self.wall * 1e3, 3),
            "stages_ms": stages,
            "unaccounted_ms": round(self.unaccounted * 1e3, 3),
            "reading_ms": round(self.reading * 1e3, 3),
            "tokens": dict(self.tokens),
            "missing": list(self.missing),
            "other_clocks": list(self.other_clocks),
        }


def settle(legs: Legs, accounts: Iterable[Account]) -> Ledger:
    """The ledger of a hand-over whose first token has come."""
    prefill, decode = PrefillTimes(arrived=0), DecodeTimes(arrived=0)
    others = []
    for account in accounts:
        side = "prefill" if isinstance(account.times, PrefillTimes) else "decode"
        times = account.times
        if account.clock != legs.clock or not legs.clock:
            others.append(side)
            times = _moved(times, (legs.prefill_sent if side == "prefill" else legs.decode_sent) - times.arrived)
        if isinstance(times, PrefillTimes):
            prefill = times
        else:
            decode = times
    spans = tuple(
        (stage, max(begin, legs.arrived), min(end, legs.first_token))
        for stage, begin, end in _spans(legs, prefill, decode)
        if begin and max(begin, legs.arrived) < min(end, legs.first_token)
    )
    stages = _exposed(spans, legs.arrived, legs.first_token)
    wall = (legs.first_token - legs.arrived) / 1e9
    return Ledger(
        wall=wall,
        stages=stages,
        unaccounted=max(wall - sum(stages.values()), 0.0),
        reading=decode.reading / 1e9,
        tokens={
            "prompt": decode.prompt,
            "cached": decode.cached,
            "expected": decode.expected,
            "loaded": decode.loaded,
            "reused": prefill.loaded,
        },
        missing=tuple(s for s, times in (("prefill", prefill), ("decode", decode)) if not times.arrived),
        other_clocks=tuple(others),
        spans=spans,
    )


def _spans(legs: Legs, prefill: PrefillTimes, decode: DecodeTimes) -> list[Span]:
    """In the order in which they count where they overlap."""
    spans = [
        ("retries", legs.began, legs.attempt),
        ("turn", legs.turn_sought, legs.turn_found),
        ("router", legs.arrived, legs.began),
        ("router", legs.attempt, legs.prefill_sent),
        ("p_queue", legs.prefill_sent, prefill.scheduled),
        ("prefill", prefill.scheduled, prefill.computed),
    ]
    ordered = decode.ordered or decode.scheduled
    if legs.streamed:
        spans += [
            ("d_queue", decode.arrived, ordered),
            ("announce", max(prefill.computed, ordered), decode.announced),
        ]
    else:
        spans += [
            ("announce", prefill.computed, legs.prefill_answered),
            ("router", legs.prefill_answered, legs.decode_sent),
            ("announce", legs.decode_sent, decode.arrived),
            ("d_queue", decode.arrived, ordered),
        ]
    return [
        *spans,
        ("wire", max(decode.announced, ordered), decode.read),
        ("commit", decode.read, decode.confirmed),
        ("d_queue", decode.confirmed, decode.scheduled),
        ("first_token", decode.scheduled, legs.first_token),
    ]


def _exposed(spans: Iterable[Span], begin: int, end: int) -> dict[str, float]:
    """Seconds of each stage within the bounds that no earlier span covers."""
    free = [(begin, end)]
    stages = dict.fromkeys(STAGES, 0.0)
    for stage, start, stop in spans:
        left = []
        for low, high in free:
            inner = max(low, start), min(high, stop)
            if inner[0] >= inner[1]:
                left.append((low, high))
                continue
            stages[stage] += (inner[1] - inner[0]) / 1e9
            left += [piece for piece in ((low, inner[0]), (inner[1], high)) if piece[0] < piece[1]]
        free = left
    return stages


def _moved(times: PrefillTimes | DecodeTimes, shift: int) -> PrefillTimes | DecodeTimes:
    """Stamps of another clock, by ours."""
    durations = {"prompt", "cached", "expected", "loaded", "reading"}
    moved = {name: value + shift for name, value in asdict(times).items() if value and name not in durations}
    return replace(times, **moved)
