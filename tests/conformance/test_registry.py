"""Which transports exist, start and are chosen, and the reasons against the rest."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pd_connector.errors import ConfigError, TransportUnavailable
from pd_connector.memory import MemoryKind, native
from pd_connector.transport import registry
from pd_connector.transport.base import Transport
from pd_connector.transport.inproc import InprocTransport

IN_C = tuple(name for name in registry.ORDER if name not in ("inproc", "zmq"))


def usable() -> list[str]:
    """Those in C for the host's memory that work here."""
    kinds = {name: registry.load(name) for name in IN_C}
    fit = {name: kind for name, kind in kinds.items() if MemoryKind.HOST in kind.traits.memory and not kind.for_devices}
    return [name for name, kind in fit.items() if kind.probe({}) is None]


NATIVE = usable()
FAULTY = "pd_connector.testing.faults:FaultyTransport"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, whether or not this distribution's own entry points are."""
    names = {**registry._BUILT_IN, "faulty": FAULTY}
    monkeypatch.setattr(registry, "known", lambda: names)
    return names


@contextmanager
def started(*args: object) -> Iterator[tuple[dict[str, Transport], dict[str, str]]]:
    transports, reasons = registry.start(*args)  # type: ignore[arg-type]
    with ExitStack() as stack:
        for transport in transports.values():
            stack.callback(transport.close)
        yield transports, reasons


def test_auto_starts_what_exists_best_first() -> None:
    working = usable()
    with started("auto", "a", {}) as (transports, reasons):
        assert list(transports) == ["inproc", *working, "zmq"]
        assert list(reasons) == [name for name in IN_C if name not in working]


def test_auto_says_why_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InprocTransport, "probe", classmethod(lambda cls, options: "out of order"))
    with started("auto", "a", {}) as (transports, reasons):
        assert list(transports) == [*usable(), "zmq"]
        assert reasons["inproc"] == "out of order"
    with pytest.raises(TransportUnavailable, match="out of order"):
        registry.start(["inproc", "zmq"], "a", {})
    assert registry.available({})["inproc"] == "out of order"


def test_auto_with_nothing_usable_gives_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in map(registry.load, registry.ORDER):
        monkeypatch.setattr(kind, "probe", classmethod(lambda cls, options: f"{cls.name} is out of order"))
    with pytest.raises(TransportUnavailable, match=r"inproc is .*shm is .*tcp is .*zmq is out of order"):
        registry.start("auto", "a", {})


def test_a_wrapper_serves_under_its_inner_name() -> None:
    with started(["faulty"], "a", {"faulty": {"inner": "zmq"}}) as (ours, _), started("zmq", "b", {}) as (theirs, _):
        assert list(ours) == ["zmq"]
        offered = {name: transport.describe() for name, transport in ours.items()}
        assert registry.choose(theirs, offered)[0] == "zmq"
        assert registry.choose(ours, {"zmq": theirs["zmq"].describe()})[0] == "zmq"
    with pytest.raises(ConfigError, match="two transports"):
        registry.start(["faulty", "zmq"], "a", {"faulty": {"inner": "zmq"}})


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="did you mean 'inproc'"):
        registry.start(["inprok"], "a", {})
    with pytest.raises(ConfigError, match="known: "):
        registry.load("quantum")
    for wanted in ([], ["zmq", "zmq"]):
        with pytest.raises(ConfigError):
            registry.start(wanted, "a", {})


@pytest.mark.parametrize(
    "value", ["no.such.module:X", "pd_connector.transport.base:Nothing", "pd_connector.plan:CopyPlan"]
)
def test_an_entry_point_that_does_not_load_is_unavailable(installed: dict[str, str], value: str) -> None:
    installed["broken"] = value
    reason = registry.available({})["broken"]
    assert reason
    assert value in reason
    with pytest.raises(TransportUnavailable, match="broken"):
        registry.start(["broken"], "a", {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zmq": {"hots": ""}}, "did you mean 'host'"),
        ({"tcp": {"thread": 1}}, "did you mean 'threads'"),
        ({"verbs": {"rail": 2}}, "did you mean 'rails'"),
        ({"verbs": {"near": "banana"}}, "near 'banana' is no PCI address"),
        ({"hixl": {"cpus": [1023]}}, "no processor 1023"),
        ({"staged-tcp": {"slot": 4}}, "did you mean 'slots'"),
        ({"staged-tcp": {"inner": {"thread": 4}}}, "did you mean 'threads'"),
    ],
)
def test_bad_options_are_the_users_mistake_even_with_auto(options: dict[str, Any], words: str) -> None:
    """Also of transports that cannot be used here, or that nobody needs for this memory."""
    with pytest.raises(ConfigError, match=words):
        registry.start("auto", "a", options)


def test_what_should_work_here_and_does_not_start_is_an_error_even_with_auto() -> None:
    """Else an operator's port would silently not be served. What had started before it is stopped again."""
    threads = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportUnavailable, match=rf"cannot listen at .*:{port}.*'port' \(0 picks"):
            registry.start("auto", "a", {"zmq": {"port": port}})
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", ["zmq", *NATIVE])
@pytest.mark.parametrize(
    "option", [{"cpus": [-1]}, {"cpus": [2**40]}, {"cpus": [1024]}, {"threads": -1}, {"threads": 2**40}]
)
def test_processors_and_threads_that_cannot_be(name: str, option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"threads|cpus"):
        registry.start(name, "a", {name: option})


def test_auto_is_not_a_transport_among_others() -> None:
    with pytest.raises(ConfigError, match="'auto' stands alone"):
        registry.start(["auto"], "a", {})


def test_choose_gives_a_reason_for_every_other_one() -> None:
    wanted = ["inproc", "zmq"]
    with started(wanted, "a", {}) as (ours, _), started(wanted, "b", {}) as (theirs, _):
        offered = {name: transport.describe() for name, transport in theirs.items()}
        assert registry.choose(ours, offered) == ("inproc", {"zmq": "inproc comes first"})
        assert registry.choose(ours, offered, ["zmq"])[0] == "zmq"
        name, reasons = registry.choose(ours, {**offered, "shm": b""}, ["tcp", "inproc"])
        assert name == "inproc"
        assert reasons == {"tcp": "not started here", "zmq": "inproc comes first", "shm": "not started here"}
        theirs["inproc"].close()
        name, reasons = registry.choose(ours, offered)
        assert name == "zmq"
        assert "no such agent" in reasons["inproc"]
        with pytest.raises(TransportUnavailable, match=r"inproc: .*zmq: the peer does not offer it"):
            registry.choose(ours, {"inproc": b"?"})
        with pytest.raises(TransportUnavailable, match="neither"):
            registry.choose({}, {})


def test_without_the_extension_the_rest_works_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_connector.transport.native.native", lambda: None)
    with started("auto", "a", {}) as (transports, reasons):
        assert list(transports) == ["inproc", "zmq"]
        assert "PD_NATIVE=require" in reasons["shm"]
        assert "PD_NATIVE=require" in reasons["tcp"]
    with pytest.raises(TransportUnavailable, match="C extension is not installed"):
        registry.start("shm", "a", {})


@pytest.mark.skipif(native() is None, reason="the C extension was not built")
def test_shared_memory_is_refused_to_another_host() -> None:
    with started("shm", "a", {}) as (ours, _), started("shm", "b", {}) as (theirs, _):
        theirs["shm"].register([])
        where = theirs["shm"].describe()
        assert ours["shm"].can_reach(where) is None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().encode()
        assert boot in where
        elsewhere = where.replace(boot, b"f" * len(boot))
        assert "another host" in str(ours["shm"].can_reach(elsewhere))
        theirs["shm"].close()
        assert "gone" in str(ours["shm"].can_reach(where))
