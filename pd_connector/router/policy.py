"""Which upstream serves the next leg, and whether both legs go out at once. Pure: no I/O, no clock; times are monotonic
seconds passed in by the caller."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Standing:
    """What the balancer knows of one upstream."""

    in_flight: int = 0
    last_turn: int = 0
    aside_until: float = float("-inf")


class Balancer:
    """Least in-flight first, ties in turn; what could not be reached is used only when nothing else is left."""

    def __init__(self, names: Sequence[str], cooldown_s: float) -> None:
        self._standings = {name: Standing() for name in names}
        self._cooldown_s = cooldown_s
        self._turn = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._standings)

    def take(self, now: float, exclude: Collection[str] = ()) -> str | None:
        """Choose an upstream and count one more leg in flight on it; None when all are excluded."""
        candidates = [name for name in self._standings if name not in exclude]
        if not candidates:
            return None

        def rank(name: str) -> tuple[bool, int, int]:
            standing = self._standings[name]
            return now < standing.aside_until, standing.in_flight, standing.last_turn

        chosen = min(candidates, key=rank)
        self._turn += 1
        self._standings[chosen].in_flight += 1
        self._standings[chosen].last_turn = self._turn
        return chosen

    def give_back(self, name: str) -> None:
        """The leg that ``take`` counted has ended."""
        self._standings[name].in_flight -= 1

    def unreachable(self, name: str, now: float) -> None:
        self._standings[name].aside_until = now + self._cooldown_s

    def reachable(self, name: str) -> None:
        self._standings[name].aside_until = float("-inf")

    def is_aside(self, name: str, now: float) -> bool:
        return now < self._standings[name].aside_until

    def in_flight(self, name: str) -> int:
        return self._standings[name].in_flight


@dataclass(frozen=True, slots=True)
class Mode:
    """How one hand-over goes; ``code`` is from a closed set, ``why`` for people."""

    streamed: bool
    code: str
    why: str


AGAIN = Mode(False, "again", "an attempt to stream it failed")


def choose_mode(tokens: int, min_tokens: int, address: str | None, others: int, max_queue: int) -> Mode:
    """``tokens``: about how long the prompt is; ``address``: where P's agent answers, as far as it is known;
    ``others``: prefills under way at P besides this one."""
    if tokens < min_tokens:
        return Mode(False, "short", f"about {tokens} tokens, fewer than stream_min_tokens ({min_tokens})")
    if address is None:
        return Mode(False, "unknown", "the prefill instance's address is not known yet, or it has several")
    if others >= max_queue:
        return Mode(False, "queue", f"{others} other prefills are under way there (stream_max_queue {max_queue})")
    return Mode(True, "long", f"about {tokens} tokens")
