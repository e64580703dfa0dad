"""``pdc doctor --selftest``: reads between two processes over everything that claims to work here, and their bytes.

Nothing that may crash or hang runs in this process: it only asks children, each question under a deadline.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pd_connector.config import Config, ascend_settings
from pd_connector.doctor import ascend, installation, trial
from pd_connector.doctor.child import Child
from pd_connector.doctor.findings import Findings, Unavailable
from pd_connector.doctor.reach import beside
from pd_connector.doctor.report import Row, State
from pd_connector.doctor.symbols import Found
from pd_connector.errors import ConfigError, PDError
from pd_connector.memory import MemoryKind
from pd_connector.runtime.courier import transport_options
from pd_connector.transport import registry
from pd_connector.transport.base import Scope

WHOLE_S = 55.0
_LATEST_S = 40.0
"""No trial begins later: it could not be told from one that hangs."""
_LOOK_S = 20.0
_ONE_PROCESS = "it works within one process only"
_TWO_NPUS = "a communicator needs two NPUs: show both to this process, or give --device N,M"

_NO_TIME = f"the first {_LATEST_S:g} s were over: run it alone with --transport"
_ORDER = (MemoryKind.NPU, MemoryKind.CUDA, MemoryKind.HOST)
"""If there is not the time for all, then for what is most likely to be asked about."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """``transports``: only these (empty: all that are available). ``devices``: of the owner and the reader (None: the
    first two). ``wrong_byte``: the owners' memory is spoiled and every read must show it; for tests of this."""

    config: Config
    transports: tuple[str, ...] = ()
    devices: tuple[int, int] | None = None
    wrong_byte: bool = False


def parse_devices(text: str) -> tuple[int, int]:
    """N or N,M. Raises ConfigError."""
    words = text.split(",")
    if len(words) > 2 or not all(word.isdecimal() and len(word) < 5 for word in words):
        raise ConfigError(f"--device {text!r}: write one number for both sides, or two such as 0,1: owner and reader")
    return int(words[0]), int(words[-1])


def run(options: Options, progress: Progress, started: Callable[[Child], None] = lambda child: None) -> Findings:
    """Raises ConfigError for a transport that nobody knows. ``started`` is told of every process of a trial."""
    for name in options.transports:
        registry.load(name)
    begun = time.monotonic()
    findings = Findings(versions())
    try:
        given = transport_options(beside(options.config))
        progress("looking around")
        with Child("process that looks around") as child:
            seen = child.ask("look", _LOOK_S, options=given)
    except PDError as error:
        remedy = "run the same in another environment: it loads each library that a transport needs, and one does harm"
        findings.rows.append(Row("self-test", State.FAIL, str(error), remedy))
        return findings
    findings.rows += _ascend_rows(seen, options)
    cases = _cases(options, seen, given, findings, begun + WHOLE_S)
    if options.devices is not None and all(case.memory is MemoryKind.HOST for case in cases):
        remedy = "leave --device away, or see below why no transport with memory of a device is tried"
        findings.rows.append(Row("devices", State.FAIL, "--device: no memory of a device can be tried", remedy))
    for number, case in enumerate(cases, 1):
        if time.monotonic() > begun + _LATEST_S:
            findings.unavailable.append(Unavailable(case.transport, case.memory, _NO_TIME))
            continue
        progress(f"{number} of {len(cases)}: {case.transport}, {case.memory} memory")
        findings.trials.append(trial.run(case, started))
    findings.seconds = round(time.monotonic() - begun, 1)
    return findings


def versions() -> dict[str, str]:
    rows = installation.rows()
    found = {row.name: row.found for row in rows if row.name != "vLLM plugin"}
    also = {name: number for name in ("torch", "torch-npu") if (number := installation.version_of(name)) is not None}
    return found | {"numpy": np.__version__} | also | ascend.versions(ascend_settings())


def _ascend_rows(seen: Mapping[str, Any], options: Options) -> list[Row]:
    settings, count = ascend_settings(), seen["devices"][MemoryKind.NPU]
    devices = options.devices or tuple(range(max(count, 1)))
    nodes = ascend.present()
    chips = ascend.physical(devices, nodes, settings.get("ASCEND_RT_VISIBLE_DEVICES")) if nodes or count else []
    return ascend.rows([Found(**each) for each in seen["symbols"]], chips, settings)


def _cases(
    options: Options, seen: Mapping[str, Any], given: Mapping[str, Any], findings: Findings, end: float
) -> list[trial.Case]:
    """What to try; what not, and why, goes to the findings."""
    cases = []
    for name, reason in seen["transports"].items():
        if options.transports and name not in options.transports:
            continue
        wanted = name in options.transports
        if reason is None and getattr(registry.load(name), "traits", None) is None:
            reason = "it does not say what memory it reads"
        elif reason is None and registry.load(name).traits.scope is Scope.PROCESS:
            reason = _ONE_PROCESS
        if reason is not None:
            findings.unavailable.append(Unavailable(name, "any", reason, wanted))
            continue
        for kind in map(MemoryKind, seen["memory"][name]):
            devices, why_not = _devices(options, kind, seen)
            if not why_not and name == "hccl" and devices[0] == devices[1]:
                why_not = _TWO_NPUS
            if why_not:
                findings.unavailable.append(Unavailable(name, kind, why_not))
                continue
            cases.append(trial.Case(name, kind, devices, given.get(name, {}), end, options.wrong_byte))
    return sorted(cases, key=lambda case: _ORDER.index(case.memory))


def _devices(options: Options, kind: MemoryKind, seen: Mapping[str, Any]) -> tuple[tuple[int, int], str]:
    if kind is MemoryKind.HOST:
        return options.devices or (0, 0), ""
    count = seen["devices"][kind]
    if not count:
        return (0, 0), seen["no_device"][kind]
    return options.devices or (0, count - 1), ""


def tell(words: str) -> None:
    """Progress for people, who wait up to a minute; the report goes to stdout."""
    print(f"self-test: {words}".ljust(60), end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
