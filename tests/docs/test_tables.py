"""Tables in the documents against the code that they describe: neither can drift from the other."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from typing import Any, get_args

import msgspec
import pytest
from documents import READMES, ROOT, fields, first_column, read, section, table, tables

from pd_connector.cli import _parser
from pd_connector.config import Config
from pd_connector.layout import Form, GroupLayout, KVLayout, Part
from pd_connector.protocol import messages
from pd_connector.protocol.context import Identity, Limits
from pd_connector.protocol.core import Core
from pd_connector.protocol.params import KEY, to_params
from pd_connector.protocol.ticket import Ticket
from pd_connector.router.metrics import RouterMetrics
from pd_connector.router.settings import RouterSettings
from pd_connector.transport import staged_wire, zmq_wire
from pd_connector.transport.cuda import CudaOptions
from pd_connector.transport.hccl import HcclOptions
from pd_connector.transport.hixl import HixlOptions
from pd_connector.transport.native import NativeOptions, TcpOptions
from pd_connector.transport.options import Listening
from pd_connector.transport.staged import StagedOptions
from pd_connector.transport.verbs import VerbsOptions

WIRE, CONFIGURATION, OPERATIONS = (f"docs/{name}.md" for name in ("wire_protocol", "configuration", "operations"))
MESSAGES: dict[str, type[messages.Message]] = {
    str(kind.__struct_config__.tag): kind for kind in get_args(messages.AnyMessage)
}
STRUCTS = {
    kind.__name__: kind
    for kind in (
        messages.Endpoint,
        messages.PrefillTimes,
        messages.DecodeTimes,
        messages.AuditPlan,
        messages.Audit,
        KVLayout,
        GroupLayout,
        Form,
        Part,
        Ticket,
    )
}
ZMQ = {kind.__name__: kind for kind in (zmq_wire.Where, zmq_wire.Ping, zmq_wire.Read, zmq_wire.Pong, zmq_wire.Answer)}


def without_meaning(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    assert all(row.pop("Meaning") for row in rows), "every field has a meaning"
    return rows


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_common_fields() -> None:
    assert without_meaning(table(read(WIRE), "Common fields")) == fields(messages.Message)


@pytest.mark.parametrize("kind", MESSAGES)
def test_fields_of_a_message(kind: str) -> None:
    own = fields(MESSAGES[kind], leave_out=("src", "dst"))
    if own:
        assert without_meaning(table(read(WIRE), kind)) == own
    else:
        assert "no fields of its own" in section(read(WIRE), kind)


@pytest.mark.parametrize("name", [*STRUCTS, *ZMQ])
def test_fields_of_a_structure(name: str) -> None:
    assert without_meaning(table(read(WIRE), name)) == fields((STRUCTS | ZMQ)[name])


@pytest.mark.parametrize("name", ["Ping", "Read", "Pong", "Answer"])
def test_tag_of_a_zmq_message(name: str) -> None:
    assert f"Tag {ZMQ[name].__struct_config__.tag}," in section(read(WIRE), name)


def test_messages_of_the_staged_transports() -> None:
    kinds = [staged_wire.Ping, staged_wire.Fill, staged_wire.Return, *get_args(staged_wire.ToReader)]
    told = [(k.__name__, k.__struct_config__.tag, ", ".join(k.__struct_fields__)) for k in kinds]
    text = section(read(WIRE), "The staged transports")
    rows = [row.values() for row in tables(text)[0]]
    assert [(name, int(tag), names.replace("`", "")) for name, tag, _, names in rows] == told
    assert all(f"`{name}`" in text for name in staged_wire.Where.__struct_fields__)
    assert f"`version` (now {staged_wire.VERSION})" in text
    assert (staged_wire.MAX_REQUEST_FRAME, staged_wire.MAX_ANSWER_FRAME) == (33 << 10, 1 << 10)
    assert all(f"{int(code)} (" in text for code in staged_wire.Code)


def test_list_of_messages() -> None:
    assert first_column(table(read(WIRE), "Messages")) == list(MESSAGES)


def test_every_message_has_a_section_and_nothing_else_has() -> None:
    part = read(WIRE).partition("\n## Messages\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.*)$", part, re.MULTILINE) == list(MESSAGES)


def test_version_and_sizes() -> None:
    text = read(WIRE)
    assert f"protocol version {messages.VERSION}" in text
    assert f"version of the zmq transport, now {zmq_wire.VERSION}" in text
    assert messages.MAX_FRAME == 4 << 20
    assert "4 MiB (`MAX_FRAME`)" in text
    assert zmq_wire.MAX_REQUEST_FRAME == 33 << 10
    assert "at most 33 KiB" in text


def test_kv_transfer_params() -> None:
    ticket = Ticket(
        address="tcp://127.0.0.1:1", incarnation=1, lease=1, epoch=1, capability=bytes(16), blocks=((1,),), tokens=1
    )
    params = to_params(ticket, request_id="r", engine_id="e", tp_size=1, pp_size=1)
    rows = table(read(WIRE), "kv_transfer_params")
    assert set(first_column(rows)) == set(params)
    (ours,) = (row["Meaning"] for row in rows if row["Key"] == KEY)
    assert all(key in ours for key in params[KEY])


# --- configuration ----------------------------------------------------------------------------------------------------


def defaults(struct: Any) -> list[tuple[str, str]]:
    """(name, default as JSON) of each field; times are written without a fraction where they have none."""
    if dataclasses.is_dataclass(struct):
        pairs = [(field.name, field.default) for field in dataclasses.fields(struct)]
    else:
        given = struct()
        pairs = [(name, getattr(given, name)) for name in struct.__struct_fields__]
    return [(n, f"{v:g}" if isinstance(v, float) else json.dumps(msgspec.to_builtins(v))) for n, v in pairs]


def documented(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(cells[0], cells[1]) for cells in (list(row.values()) for row in rows)]


@pytest.mark.parametrize(
    ("page", "heading"), [(CONFIGURATION, "Agent settings"), (READMES[0], "Configuration"), (READMES[1], "配置")]
)
def test_settings(page: str, heading: str) -> None:
    assert documented(table(read(page), heading)) == defaults(Config)


def test_options_of_the_zmq_transport() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the zmq transport")) == defaults(Listening)


def test_options_of_the_tcp_transport() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the tcp transport")) == defaults(TcpOptions)


def test_options_of_the_cuda_transport() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the cuda transport")) == defaults(CudaOptions)


def test_options_of_the_verbs_transport() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the verbs transport")) == defaults(VerbsOptions)


def test_options_of_the_staged_transports() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the staged transports")) == defaults(StagedOptions)


def test_hixl_options() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the hixl transport")) == defaults(HixlOptions)


def test_hccl_options() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the hccl transport")) == defaults(HcclOptions)


def test_options_of_the_shm_transport() -> None:
    assert documented(table(read(CONFIGURATION), "Options of the shm transport")) == defaults(NativeOptions)


def test_limits() -> None:
    assert documented(table(read(CONFIGURATION), "Limits of an agent")) == defaults(Limits)


def test_router() -> None:
    options, settings = tables(section(read(CONFIGURATION), "Router"))
    commands = next(action for action in _parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    known = [word for action in commands.choices["router"]._actions for word in action.option_strings]
    assert first_column(options) == [word for word in known if word not in ("-h", "--help")]
    assert documented(settings) == defaults(RouterSettings)


# --- metrics ----------------------------------------------------------------------------------------------------------


def operations(heading: str) -> list[list[dict[str, str]]]:
    return tables(section(read(OPERATIONS), heading))


def test_metrics_of_an_instance() -> None:
    """By the plugin's source: importing it would load an engine."""
    source = (ROOT / "pd_connector/vllm_plugin/metrics.py").read_text()
    names = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    names = {name for name in names if isinstance(name, str)}
    exported = {name for name in names if re.fullmatch(r"vllm:pdc_\w+", name) and name != "vllm:pdc_"}
    exported |= {f"vllm:pdc_{name}" for name in names if re.fullmatch(r"\w+_time_seconds", name)}
    documented_names = first_column(operations("Metrics of an instance")[0])
    assert set(documented_names) == exported
    assert len(documented_names) == len(exported)


def test_states() -> None:
    gauges = Core(Identity("agent", 1)).gauges()
    assert first_column(operations("Metrics of an instance")[1]) == list(gauges)


def counted() -> set[str]:
    """Every name under which the package counts something that becomes a value of ``event``."""
    package = ROOT / "pd_connector"
    paths = [path for part in ("protocol", "runtime", "vllm_plugin") for path in (package / part).glob("*.py")]
    found = {f"transfers_{outcome}" for outcome in ("done", "failed", "aborted", "abandoned")}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Subscript(value=ast.Attribute(attr="counters" | "_counters"), slice=key):
                    if not isinstance(key, ast.JoinedStr):
                        found |= {part.value for part in ast.walk(key) if isinstance(part, ast.Constant)}
                case ast.Call(func=ast.Attribute(attr="_decline"), args=[_, _, ast.Constant(value=str(key)), *_]):
                    found.add(key)
                case ast.Call(func=ast.Attribute(attr="_keep_back"), args=[_, ast.Constant(value=str(key)), *_]):
                    found.add(key)
                case ast.FunctionDef(name="_problem"):
                    found |= {
                        part.value.elts[0].value
                        for part in ast.walk(node)
                        if isinstance(part, ast.Return) and isinstance(part.value, ast.Tuple)
                    }
    for path in package.glob("transport/zmq_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                target = node.targets[0]
                if isinstance(target, ast.Attribute) and target.attr == "counters":
                    found |= {f"zmq_{key.value}" for key in node.value.keys}
    return found


def test_events() -> None:
    events = first_column(operations("Metrics of an instance")[2])
    assert set(events) == counted()
    assert len(events) == len(set(events))


def test_metrics_of_the_router() -> None:
    metrics = {metric.name: metric for metric in RouterMetrics().registry.collect()}
    rows = operations("Metrics of the router")[0]
    assert [(row["Name"], row["Kind"]) for row in rows] == [(name, m.type) for name, m in metrics.items()]
