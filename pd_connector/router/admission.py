"""How much work may be under way at once."""

from __future__ import annotations

from pd_connector.router.faults import Fault
from pd_connector.router.metrics import RouterMetrics

RETRY_AFTER_S = 1


class Admission:
    """Counts choices in flight up to ``limit``. No queue here: the engines behind have one, with better knowledge."""

    def __init__(self, limit: int, metrics: RouterMetrics) -> None:
        self._limit = limit
        self._taken = 0
        metrics.in_flight.set_function(lambda: self._taken)

    def take(self, count: int) -> None:
        """Raises Fault (503 with Retry-After) when ``count`` more would pass the limit."""
        if self._taken + count > self._limit:
            raise Fault(
                503,
                "overloaded",
                f"{self._taken} of at most {self._limit} choices are in flight; try again in {RETRY_AFTER_S} s",
                retry_after_s=RETRY_AFTER_S,
            )
        self._taken += count

    def give_back(self, count: int) -> None:
        self._taken -= count


class Slot:
    """One client request's share of the admission: one place while its body is read, then one for each choice."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._count = 0

    def grow_to(self, count: int) -> None:
        self._admission.take(count - self._count)
        self._count = count

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.give_back(self._count)
