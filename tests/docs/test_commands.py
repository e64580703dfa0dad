"""Every command in the documents is run here, or listed with the reason why it is not; those are checked as far as a
reader would: options parse, targets exist, configuration is accepted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest
import zmq
from documents import ROOT, Command, commands

from pd_connector.cli import _parser
from pd_connector.config import Config, parse
from pd_connector.memory import native
from pd_connector.testing.sim_plants import PLANTS

ALL = commands()
_SECONDS = 50


def run(*words: str) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(words: list[str], *options: str) -> str:
    """Without making the environment that these tests run in."""
    return run("make", *options, "-o", "venv", f"VENV={sys.prefix}", *words)


def keygen(words: list[str]) -> None:
    keys = json.loads(run(sys.executable, "-m", "pd_connector.cli", *words[1:]))
    parse({**keys, "allowed_keys": [keys["public_key"]]})


def list_of_plants(words: list[str]) -> None:
    assert make(words[1:]).split() == list(PLANTS)


def doctor(words: list[str]) -> None:
    assert "every byte is right" in run(sys.executable, "-m", "pd_connector.cli", *words[1:])


def selftest(words: list[str]) -> None:
    """Over one transport: tests/runtime/test_selftest.py tries all of them."""
    assert "verdict: passed" in run(sys.executable, "-m", "pd_connector.cli", *words[1:], "--transport", "zmq")


def bench(words: list[str]) -> None:
    if native() is not None:  # shm is what it measures
        assert "GB/s" in run(sys.executable, "-m", "pd_connector.cli", *words[1:])


RUN: dict[str, Callable[[list[str]], None]] = {
    "pdc keygen --json": keygen,
    "pdc doctor": doctor,
    "pdc doctor --selftest": selftest,
    "pdc bench transfer --transport shm --chunk 65536 --rounds 3": bench,
    "make -s sim PLANT=list": list_of_plants,
}

NOT_RUN: list[tuple[str, str]] = [
    (r"make demo", "minutes of real vLLM: tests/demo runs the same"),
    (r"make test", "this is it"),
    (r"make rdma-test( ARGS=--short)?", "minutes of emulated machines: .ci/run runs the short one"),
    (
        r"make sim (SEEDS|SEED|PLANT)=\S+",
        "minutes of all cores, or meant to fail: tests/simulation runs the same module",
    ),
    (
        r"pip install \S+",
        "would change the environment that these tests run in; .ci/run installs from a clean checkout",
    ),
    (r"vllm serve MODEL .*", "starts a server: tests/vllm does, with these settings"),
    (r"VLLM_CPU_\S+ .* --model MODEL .*", "starts a server: tests/vllm does, with these settings"),
    (r"pdc router --prefill .*", "serves until it is stopped: tests/router and tests/demo start it"),
    (r"pdc doctor --serve( --config \S+)?", "serves until it is stopped: tests/runtime/test_doctor.py starts it"),
    (r"pdc doctor tcp://\S+( --config \S+)?", "needs a peer: tests/runtime/test_doctor.py has some"),
    (r"pdc doctor --selftest --json", "the same again: tests/runtime/test_selftest.py reads its JSON"),
    (r"pdc doctor --selftest --transport hixl .*", "needs NPUs: tests/ascend_emulated has emulated ones"),
    (r"(npu-smi info|hccn_tool -i 0 -\w+ -g)", "needs an NPU and its driver's tools, which no machine of ours has"),
    (r"export IMAGE=\S+|docker run .* \$IMAGE bash", "needs docker, NPUs and their driver"),
    (r"export HCCL_INTRA_ROCE_ENABLE=1", "means something to Ascend's libraries only"),
    (r"PD_NATIVE=require pip install '\.\[router\]'", "would change the environment that these tests run in"),
    (r"ASCEND_RT_VISIBLE_DEVICES=\d vllm serve MODEL .*", "needs an NPU; its settings are parsed below"),
    (r"pdc ledger http://\S+", "needs a router with requests behind it: tests/vllm/test_streamed.py has one"),
    (r"curl http://127\.0\.0\.1:8000/v1/completions .*", "needs the servers: tests/demo sends such requests"),
    (r"curl -s http://127\.0\.0\.1:8200/metrics .*", "needs the servers: tests/demo reads the same page"),
]


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN if re.fullmatch(pattern, command)), None)


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page}: {command.text[:40]}")
def test_is_run_or_listed(command: Command) -> None:
    assert (command.text in RUN) != (reason(command.text) is not None), f"run or list exactly once: {command}"


@pytest.mark.parametrize("text", RUN)
def test_run(text: str) -> None:
    RUN[text](shlex.split(text))


def test_nothing_is_listed_in_vain() -> None:
    texts = {command.text for command in ALL}
    assert set(RUN) <= texts
    assert [pattern for pattern, _ in NOT_RUN if not any(re.fullmatch(pattern, text) for text in texts)] == []


def unique(start: str) -> list[str]:
    found = sorted({command.text for command in ALL if start in command.text})
    assert found, f"no command with {start!r}"
    return found


@pytest.mark.parametrize("text", [text for text in unique("make ") if text not in RUN])
def test_make_knows_it(text: str) -> None:
    make(shlex.split(text)[1:], "-n")


@pytest.mark.parametrize("text", [*unique("pdc router"), *unique("pdc doctor"), *unique("pdc ledger")])
def test_options_parse(text: str) -> None:
    _parser().parse_args(shlex.split(text)[1:])


@pytest.mark.parametrize("text", unique("--kv-transfer-config"))
def test_vllm_configuration_is_accepted(text: str) -> None:
    words = shlex.split(text)
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer.pop("kv_connector") == "PDConnector"
    assert transfer.pop("kv_role") in ("kv_producer", "kv_consumer", "kv_both")
    assert transfer.pop("kv_load_failure_policy", "fail") in ("fail", "recompute")
    extra = json.dumps(transfer.pop("kv_connector_extra_config", {}))
    assert not transfer
    public, secret = (key.decode() for key in zmq.curve_keypair())
    extra = re.sub(r"SECRET_\w+", lambda _: secret, re.sub(r"PUBLIC_\w+", lambda _: public, extra))
    assert isinstance(parse(json.loads(extra)), Config)


@pytest.mark.parametrize("text", unique("curl http"))
def test_body_is_json(text: str) -> None:
    words = shlex.split(text)
    assert {"model", "prompt", "max_tokens"} <= set(json.loads(words[words.index("-d") + 1]))


@pytest.mark.parametrize("text", unique("pip install"))
def test_extras_exist(text: str) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\[(\w+)\]", text)
    assert set(extras) <= set(project["optional-dependencies"])
    assert not any(name.startswith("torch") for name in project["dependencies"])
