"""Where the time of each handed-over request went in this engine: for its own histograms, and for whoever brokered the
hand-over and asked to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from pd_connector.protocol.messages import Account, DecodeTimes, PrefillTimes
from pd_connector.protocol.params import report_of
from pd_connector.runtime.clock import clock_id, stamp

Times = PrefillTimes | DecodeTimes


@dataclass
class _Open:
    """One request; ``report`` says to whom (address, id) its account goes."""

    times: Times
    report: tuple[str, bytes] | None
    cached: int = 0


class Accounts:
    """Fed by the scheduler side. ``inform`` sends an account to an address."""

    def __init__(self, inform: Callable[[str, Account], None]) -> None:
        self._inform = inform
        self._open: dict[str, _Open] = {}
        self._computing: set[str] = set()
        self._finished: list[str] = []
        self.stages: list[tuple[str, float]] = []
        """(stage, seconds) of what ended since somebody took them."""

    def __len__(self) -> int:
        return len(self._open)

    def arrived(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        prompt = int(request.num_prompt_tokens)
        times: Times
        if params.get("do_remote_decode"):
            times = PrefillTimes(arrived=stamp(), prompt=prompt)
        elif params.get("do_remote_prefill"):
            times = DecodeTimes(arrived=stamp(), prompt=prompt)
        else:
            return
        self._open[request.request_id] = _Open(times, report_of(params))

    def ordered(self, request_id: str, cached: int, expected: int) -> None:
        """Its blocks exist; so many tokens were here before, so many more are to be loaded."""
        if (known := self._open.get(request_id)) is None:
            return
        known.cached = cached
        if isinstance(known.times, DecodeTimes):
            known.times = replace(known.times, ordered=stamp(), cached=cached, expected=expected)
        else:
            known.times = replace(known.times, expected=expected)

    def scheduled(self, output: Any) -> list[str]:
        """A step was scheduled. Returns the prefills whose prompts it completes: when it does, ``measured`` is told."""
        if not self._open:
            return []
        self._settle()
        completed = []
        new = {each.req_id: int(each.num_computed_tokens) for each in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        every = {**new, **dict(zip(cached.req_ids, map(int, cached.num_computed_tokens), strict=True))}
        for request_id, computed in every.items():
            if (known := self._open.get(request_id)) is None:
                continue
            if request_id in new or not known.times.scheduled:
                self._first_scheduled(known, computed)
            if isinstance(known.times, DecodeTimes):
                self._close(request_id)
            elif request_id in self._computing:
                pass  # it goes on behind its prompt
            elif computed + int(output.num_scheduled_tokens[request_id]) >= known.times.prompt:
                self._computing.add(request_id)
                completed.append(request_id)
        return completed

    def _first_scheduled(self, known: _Open, computed: int) -> None:
        times = known.times
        # The last prompt token is computed in any case, also when it was loaded.
        whole = computed >= times.prompt - 1
        loaded = times.expected if whole else max(0, min(computed - known.cached, times.expected))
        known.times = replace(times, scheduled=times.scheduled or stamp(), loaded=loaded)

    def measured(self, clock: str, forwards: Iterable[tuple[str, int]], loads: Iterable[Mapping[str, Any]]) -> None:
        """What the workers say: when forwards ended, when loads did. Another host's clock says nothing here."""
        if clock == clock_id():
            for request_id, ended in forwards:
                known = self._open.get(request_id)
                if known is not None and isinstance(known.times, PrefillTimes):
                    known.times = replace(known.times, computed=max(known.times.computed, ended))
            for load in loads:
                known = self._open.get(load["request_id"])
                if known is not None and isinstance(known.times, DecodeTimes):
                    known.times = _with_load(known.times, load)
        self._settle()

    def finished(self, request_id: str) -> None:
        """It has ended. A prefill's account is complete when the step's results are in."""
        if request_id in self._computing:
            self._computing.discard(request_id)
            self._finished.append(request_id)
        else:
            self._open.pop(request_id, None)

    def _settle(self) -> None:
        finished, self._finished = self._finished, []
        for request_id in finished:
            self._close(request_id)

    def _close(self, request_id: str) -> None:
        known = self._open.pop(request_id)
        times = known.times
        if isinstance(times, PrefillTimes) and not times.computed:
            times = replace(times, computed=stamp())
        self.stages += _stages(times)
        if known.report is not None:
            address, of = known.report
            self._inform(address, Account(src=0, dst=0, of=of, clock=clock_id(), times=times))

    def take_stages(self) -> list[tuple[str, float]]:
        stages, self.stages = self.stages, []
        return stages


def _with_load(times: DecodeTimes, load: Mapping[str, Any]) -> DecodeTimes:
    """Every rank says so of its own part: the slowest one counts."""
    confirmed = int(load["ended"])
    read = confirmed - int(load["commit"] * 1e9)
    announced = read - int(load["tail"] * 1e9) if load["tail"] else 0
    return replace(
        times,
        confirmed=max(times.confirmed, confirmed),
        read=max(times.read, read),
        announced=max(times.announced, announced),
        reading=max(times.reading, int(load["wire"] * 1e9)),
    )


def _stages(times: Times) -> list[tuple[str, float]]:
    """What one engine knows of the stages. Those of a load itself are measured where it is done."""
    if isinstance(times, PrefillTimes):
        return [
            ("p_queue", (times.scheduled - times.arrived) / 1e9),
            ("prefill", max(times.computed - times.scheduled, 0) / 1e9),
        ]
    loaded = times.confirmed - times.ordered if times.confirmed and times.ordered else 0
    return [("d_queue", max(times.scheduled - times.arrived - loaded, 0) / 1e9)]
