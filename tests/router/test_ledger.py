"""The ledger of a first token: as arithmetic, over HTTP, with an agent that is told, as spans."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console

from pd_connector import Agent, Config
from pd_connector.errors import ConfigError, LocalProtocolError
from pd_connector.protocol.messages import Account, DecodeTimes, PrefillTimes
from pd_connector.protocol.params import report_of, with_report
from pd_connector.router import AgentBroker
from pd_connector.router.ledger import STAGES, Legs, settle
from pd_connector.router.show import fetch, table
from pd_connector.router.tracing import export_to
from pd_connector.runtime.clock import clock_id, stamp

from . import upstreams
from .conftest import World, eventually
from .upstreams import Body, Instance

MS = 1_000_000
HERE = "this boot"


def account(times: PrefillTimes | DecodeTimes, clock: str = HERE) -> Account:
    return Account(src=1, dst=0, of=bytes(16), clock=clock, times=times)


def legs(**stamps: int) -> Legs:
    """In ms."""
    streamed = bool(stamps.pop("streamed", 0))
    return Legs(clock=HERE, streamed=streamed, **{name: at * MS for name, at in stamps.items()})


def prefill(**stamps: int) -> PrefillTimes:
    return PrefillTimes(**{name: at * MS for name, at in stamps.items()})


def decode(**stamps: int) -> DecodeTimes:
    return DecodeTimes(**{name: at * MS for name, at in stamps.items()}, prompt=50, cached=10, expected=40, loaded=39)


def stages_of(ledger: Any) -> dict[str, int]:
    return {stage: round(seconds * 1e3) for stage, seconds in ledger.stages.items() if seconds}


SEQUENTIAL = legs(
    arrived=100, began=102, attempt=102, prefill_sent=103, prefill_answered=150, decode_sent=151, first_token=200
)
P = prefill(arrived=105, scheduled=110, computed=145)
D = decode(arrived=155, ordered=160, read=170, confirmed=172, scheduled=175, reading=9)


def test_one_leg_after_the_other() -> None:
    found = settle(SEQUENTIAL, [account(P), account(D)])
    assert stages_of(found) == {
        "router": 2 + 1 + 1, "p_queue": 7, "prefill": 35, "announce": 5 + 4, "d_queue": 5 + 3, "wire": 10, "commit": 2,
        "first_token": 25,
    }  # fmt: skip
    assert found.wall == pytest.approx(0.1)
    assert found.unaccounted == pytest.approx(0)
    assert (found.reading, found.missing, found.other_clocks) == (0.009, (), ())
    assert found.tokens == {"prompt": 50, "cached": 10, "expected": 40, "loaded": 39, "reused": 0}


def test_reading_along_hides_behind_the_prefill() -> None:
    here = legs(
        arrived=100, began=101, attempt=101, prefill_sent=102, prefill_answered=190, decode_sent=102, first_token=200,
        streamed=1,
    )  # fmt: skip
    d = decode(arrived=104, ordered=120, announced=147, read=152, confirmed=153, scheduled=155, reading=30)
    found = settle(here, [account(P), account(d)])
    assert stages_of(found) == {
        "router": 2, "p_queue": 8, "prefill": 35, "announce": 2, "wire": 5, "commit": 1, "d_queue": 2,
        "first_token": 45,
    }  # fmt: skip
    assert found.unaccounted == pytest.approx(0)
    assert found.reading == 0.03, "also what was hidden"


def test_a_busy_decode_instance_is_not_called_a_slow_announcement() -> None:
    here = legs(arrived=100, began=100, attempt=100, prefill_sent=100, decode_sent=100, first_token=300, streamed=1)
    d = decode(arrived=104, ordered=240, announced=250, read=260, confirmed=261, scheduled=262)
    found = stages_of(settle(here, [account(P), account(d)]))
    assert found["d_queue"] == (240 - 145) + 1
    assert found["announce"] == 10


def test_nothing_was_loaded() -> None:
    d = decode(arrived=155, scheduled=175)
    found = settle(SEQUENTIAL, [account(P), account(d)])
    assert "wire" not in stages_of(found)
    assert stages_of(found)["d_queue"] == 20
    assert found.unaccounted == pytest.approx(0)


def test_who_tells_nothing_is_unaccounted() -> None:
    found = settle(SEQUENTIAL, [account(P)])
    assert found.missing == ("decode",)
    assert found.unaccounted == pytest.approx(0.049), "from the ticket's sending on"
    found = settle(SEQUENTIAL, [])
    assert found.missing == ("prefill", "decode")
    assert stages_of(found) == {"router": 4}


def test_failed_attempts_have_a_stage_of_their_own() -> None:
    here = legs(
        arrived=50, began=51, attempt=102, prefill_sent=103, prefill_answered=150, decode_sent=151, first_token=200
    )
    found = settle(here, [account(P), account(D)])
    assert stages_of(found)["retries"] == 51
    assert found.unaccounted == pytest.approx(0)


def test_stamps_of_another_host() -> None:
    there = prefill(arrived=9005, scheduled=9010, computed=9045)
    found = settle(SEQUENTIAL, [account(there, "another boot"), account(D)])
    assert found.other_clocks == ("prefill",)
    assert stages_of(found)["p_queue"] == 5
    assert stages_of(found)["prefill"] == 35
    assert stages_of(found)["announce"] == (150 - 143) + 4
    assert found.unaccounted == pytest.approx(0)


stamps = st.integers(0, 2**40)


@given(
    st.lists(stamps, min_size=9, max_size=9),
    st.fixed_dictionaries(dict.fromkeys(("arrived", "scheduled", "computed"), stamps)),
    st.fixed_dictionaries(dict.fromkeys(("arrived", "ordered", "announced", "read", "confirmed", "scheduled"), stamps)),
    st.booleans(),
    st.sampled_from([HERE, "", "other"]),
)
def test_whatever_is_told_it_adds_up(
    ours: list[int], theirs: dict[str, int], others: dict[str, int], streamed: bool, clock: str
) -> None:
    arrived, began, attempt, sought, found_at, sent, answered, decode_sent, first = sorted(ours)
    here = Legs(
        arrived,
        HERE,
        began,
        attempt,
        sought,
        found_at,
        sent,
        answered,
        decode_sent,
        first_token=first,
        streamed=streamed,
    )
    found = settle(here, [account(PrefillTimes(**theirs), clock), account(DecodeTimes(**others), clock)])
    assert all(seconds >= 0 for seconds in found.stages.values())
    assert set(found.stages) == set(STAGES)
    assert sum(found.stages.values()) + found.unaccounted == pytest.approx(found.wall, abs=1e-6)


# --- over HTTP --------------------------------------------------------------------------------------------------------


def telling(world: World, act: upstreams.Act, times: PrefillTimes | DecodeTimes) -> upstreams.Act:
    """An instance that tells the broker as a real one would."""

    async def wrapped(instance: Instance, request: web.Request, body: Body) -> web.StreamResponse:
        wanted = report_of(body["kv_transfer_params"])
        assert wanted is not None
        assert wanted[0] == world.broker.address
        told = Account(src=1, dst=0, of=wanted[1], clock="elsewhere", times=times)
        world.broker.told.setdefault(wanted[1], []).append(told)
        return await act(instance, request, body)

    return wrapped


@pytest.mark.parametrize("stream", [True, False])
async def test_the_router_keeps_the_ledgers(world: World, stream: bool) -> None:
    await world.start(api_key="k")
    world.broker.address = "tcp://127.0.0.1:9"
    world.prefill[0].act = telling(world, upstreams.prefill, P)
    world.decode[0].act = telling(world, upstreams.slow(0.05, upstreams.decode), D)
    headers = {"Authorization": "Bearer k"}
    answer = await world.post("/v1/completions", {"prompt": "p", "stream": stream}, **headers)
    assert "first_token;dur=" in answer.headers["server-timing"]
    await world.assert_counted('pdc_router_ttft_stage_seconds_count{stage="unaccounted"}', 1)
    async with world.session.get(f"{world.url}/ledger?n=5", headers=headers) as response:
        (ledger,) = await response.json()
    assert ledger["missing"] == []
    assert ledger["other_clocks"] == ["prefill", "decode"]
    assert ledger["stream"] is stream
    assert ledger["prefill"] == world.prefill[0].url
    assert ledger["hand_over"].startswith("sequential")
    assert ledger["stages_ms"]["first_token"] > 0
    assert sum(ledger["stages_ms"].values()) + ledger["unaccounted_ms"] == pytest.approx(ledger["ttft_ms"], abs=0.02)
    await world.assert_counted('pdc_router_tokens_total{kind="loaded"}', 39)
    assert not world.broker.open, "nothing is kept of a request that is over"


async def test_an_answer_that_failed_has_no_ledger(world: World) -> None:
    await world.start(retries=0)
    world.decode[0].act = upstreams.status(500)
    assert (await world.complete()).status == 502
    async with world.session.get(f"{world.url}/ledger") as response:
        assert await response.json() == []
    assert not world.broker.open


async def test_the_ledger_is_behind_the_key_and_bounded(world: World) -> None:
    await world.start(api_key="k")
    async with world.session.get(f"{world.url}/ledger") as response:
        assert response.status == 401
    for count in ("0", "-1", "x", "1025", "9" * 50, "1" * 5000):
        async with world.session.get(
            f"{world.url}/ledger?n={count}", headers={"Authorization": "Bearer k"}
        ) as response:
            assert response.status == 400, count
            assert "1 to 1024" in (await response.json())["error"]["message"]


ROW = (
    b'{"request_id":"r","hand_over":"h","ttft_ms":1,"stages_ms":{},"unaccounted_ms":0,"tokens":{"loaded":1},'
    b'"missing":[]}'
)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n", b"", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n[",
        *(b"HTTP/1.0 200 OK\r\n\r\n" + body for body in (
            b"x", b"{}", b"[1]", b"[{}]", b"[" * 100000, ROW, b"[" + ROW.replace(b"1,", b"null,") + b"]", b"\xff",
        )),
        b"HTTP/1.0 503 No\r\n\r\nnot now",
    ],
)  # fmt: skip
async def test_who_is_no_router_is_told_so(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConfigError, match=r"no ledger from|answered 503"):
        await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}", 5, None)
    server.close()


@pytest.mark.parametrize("url", ["nonsense", "http://a b", "http://127.0.0.1:1", "ftp://127.0.0.1:1", "http://[::1"])
def test_addresses_of_nobody(url: str) -> None:
    with pytest.raises(ConfigError, match="give the address of a pdc router"):
        fetch(url, 5, None)


def test_a_table_of_what_little_there_is() -> None:
    console = Console(width=200, record=True)
    console.print(table(msgspec.json.decode(b"[" + ROW + b"]")))
    assert "1/None" in console.export_text()


# --- the broker's agent -----------------------------------------------------------------------------------------------


async def test_an_agent_tells_a_broker() -> None:
    of, told = bytes(range(16)), Account(src=0, dst=0, of=bytes(range(16)), clock=clock_id(), times=D)
    async with AgentBroker(Config()) as broker, Agent() as instance:
        address = broker.address_for("http://127.0.0.1:8000")
        broker.expect(of)
        for _ in range(4):
            instance.inform(address, told)
        instance.inform(address, Account(src=0, dst=0, of=bytes(16), clock="", times=P))
        await eventually(lambda: len(broker.accounts(of)) == 2)
        await asyncio.sleep(0.1)
        assert len(broker.accounts(of)) == 2, "one each: more is not kept"
        assert broker.accounts(of)[0].times == D
        assert broker.accounts(bytes(16)) == [], "nobody expects it"
        broker.forget(of)
        assert broker.accounts(of) == []
        with pytest.raises(LocalProtocolError, match="HOST:PORT"):
            instance.inform("http://x", told)


async def test_a_broker_on_the_loopback_is_not_offered_to_other_hosts() -> None:
    async with AgentBroker(Config()) as broker:
        assert broker.address_for("http://localhost:1")
        assert broker.address_for("http://[::1]:1")
        assert not broker.address_for("http://10.0.0.1:8100")
        assert not broker.address_for("nonsense")
    async with AgentBroker(Config(host="0.0.0.0", insecure=True, advertise="127.0.0.1")) as broker:
        assert broker.address_for("http://10.0.0.1:8100")


@pytest.mark.parametrize(
    "report",
    [
        None, 5, "x", [], {}, {"to": "tcp://h:1"}, {"of": "00" * 16}, {"to": 5, "of": "00" * 16},
        {"to": "http://h:1", "of": "00" * 16}, {"to": "tcp://h:1", "of": "00"}, {"to": "tcp://h:1", "of": "zz" * 16},
        {"to": "tcp://" + "h" * 300 + ":1", "of": "00" * 16}, {"to": "tcp://h:1", "of": None},
    ],
)  # fmt: skip
def test_reports_that_nobody_can_want(report: Any) -> None:
    assert report_of({"pdc": {"report": report}}) is None
    assert report_of({"pdc": report}) is None
    assert report_of(with_report({"pdc": report}, "tcp://h:1", bytes(16))) == ("tcp://h:1", bytes(16))


# --- spans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


async def test_spans_of_all_three(world: World, exported: InMemorySpanExporter) -> None:
    exported.clear()
    await world.start()
    world.broker.address = "tcp://127.0.0.1:9"
    now = stamp()
    world.prefill[0].act = telling(world, upstreams.prefill, P)
    world.decode[0].act = telling(world, upstreams.slow(0.1, upstreams.decode), D)
    parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    await world.post("/v1/completions", {"prompt": "p"}, traceparent=parent)
    await eventually(lambda: any(span.name == "pdc.hand_over" for span in exported.get_finished_spans()))
    spans = {span.name: span for span in exported.get_finished_spans()}
    whole = spans["pdc.hand_over"]
    assert f"{whole.context.trace_id:032x}" == "ab" * 16
    assert f"{whole.parent.span_id:016x}" == "cd" * 8
    assert whole.attributes["pdc.tokens.loaded"] == 39
    for stage in ("router", "p_queue", "prefill", "wire", "commit", "d_queue", "first_token"):
        span = spans[f"pdc.{stage}"]
        assert span.parent.span_id == whole.context.span_id
        assert span.end_time > span.start_time
    assert whole.start_time - 10 * MS < spans["pdc.prefill"].start_time < whole.end_time
    assert stamp() > now
    # What the instances trace of themselves hangs below the hand-over.
    for instance in (world.prefill[0], world.decode[0]):
        version, trace_id, span_id, _ = instance.headers[0]["traceparent"].split("-")
        assert (version, trace_id, span_id) == ("00", "ab" * 16, f"{whole.context.span_id:016x}")


async def test_a_span_says_that_it_failed(world: World, exported: InMemorySpanExporter) -> None:
    exported.clear()
    await world.start(retries=0)
    world.decode[0].act = upstreams.status(500)
    await world.complete()
    await eventually(lambda: bool(exported.get_finished_spans()))
    (span,) = exported.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR


EXPORTS = """
import sys
from pd_connector.router.tracing import Trace, export_to
export_to(sys.argv[1])
Trace({}).end({"prefill": "P"}, None)
from opentelemetry import trace
assert trace.get_tracer_provider().force_flush(10000)
"""


def test_spans_reach_a_collector() -> None:
    """Over real gRPC; in a process of its own, for a tracer provider is set once."""
    received: list[bytes] = []
    service = "opentelemetry.proto.collector.trace.v1.TraceService"

    def export(request: bytes, _: grpc.ServicerContext) -> bytes:
        received.append(request)
        return b""

    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    subprocess.run([sys.executable, "-c", EXPORTS, f"http://127.0.0.1:{port}"], check=True, timeout=60)
    server.stop(None)
    assert b"pdc.hand_over" in b"".join(received)
    assert b"pdc-router" in b"".join(received)


def test_an_endpoint_that_is_none() -> None:
    with pytest.raises(ConfigError, match="is a URL such as"):
        export_to("127.0.0.1:4317")
