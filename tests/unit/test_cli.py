"""``pdc``: exit status, one line per error, no traceback; a router that really serves and really releases."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pd_connector import Agent, Config
from pd_connector.config import parse
from pd_connector.protocol.params import to_params
from pd_connector.router import AgentBroker

PDC = [sys.executable, "-m", "pd_connector.cli"]
NOBODY = "http://127.0.0.1:9"


def pdc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PDC, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False, stdin=subprocess.DEVNULL
    )


def refused(*arguments: str | Path) -> str:
    """The one line on stderr of a command that could not run."""
    done = pdc(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_version() -> None:
    done = pdc("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"pdc \d+\.\d+\.\d+\S*\n", done.stdout)


def test_no_command_is_an_error() -> None:
    done = pdc()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_light_command_loads_nothing_heavy() -> None:
    probe = "import sys, pd_connector.cli as c; c.main(['keygen']); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=50, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "vllm", "starlette", "aiohttp", "rich", "pd_connector.runtime.agent"}


def test_keygen_makes_pairs_that_a_config_takes() -> None:
    first, second = (json.loads(pdc("keygen", "--json").stdout) for _ in range(2))
    assert first["secret_key"] != second["secret_key"]
    config = parse({**first, "allowed_keys": [second["public_key"]]})
    assert config.public_key == first["public_key"]
    assert config.secret_key not in repr(config)


def test_keygen_for_people() -> None:
    lines = pdc("keygen").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["public_key", "secret_key"]
    assert all(len(line.split()[1]) == 40 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--decode", NOBODY, "--prefill", "nonsense"), "nonsense"),
        (("--decode", NOBODY, "--prefill", NOBODY, NOBODY), "twice"),
        (("--decode", NOBODY, "--prefill", NOBODY, "--port", "70000"), "70000"),
        (("--decode", NOBODY, "--prefill", NOBODY, "--host", "0.0.0.0"), "api_key"),
        (("--decode", NOBODY, "--prefill", NOBODY, "--config", "gone.json"), "gone.json"),
        (("--decode", NOBODY, "--prefill", NOBODY, "--api-key-file", "gone.key"), "gone.key"),
    ],
)
def test_router_refuses(arguments: tuple[str, ...], told: str) -> None:
    line = refused("router", *arguments)
    assert line.startswith("pdc router: ")
    assert told in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "one JSON object"),
        ('{"leese_seconds": 1}', "lease_seconds"),
        ('{"port": -1}', "port"),
    ],
)
def test_router_refuses_a_config(text: str, told: str, tmp_path: Path) -> None:
    config = tmp_path / "router.json"
    config.write_text(text)
    assert told in refused("router", "--prefill", NOBODY, "--decode", NOBODY, "--config", config)


@pytest.mark.parametrize("prompts", ["", "0", "1,many", "1,9000", "-5"])
def test_demo_refuses_prompts(prompts: str) -> None:
    assert "--prompts" in refused("demo", f"--prompts={prompts}")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api.key"
    path.write_text("s3cret\n")
    return path


@pytest.fixture
def router(key_file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A router process with an API key, nobody behind it, and its URL."""
    command = [*PDC, "router", "--prefill", NOBODY, "--decode", NOBODY, "--port", "0", "--api-key-file", str(key_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("router listens on http://127.0.0.1:"), process.stderr and process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def status(url: str, key: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_router_serves_until_a_signal(router: tuple[subprocess.Popen[str], str], number: signal.Signals) -> None:
    process, url = router
    assert status(f"{url}/metrics") == 200
    assert status(f"{url}/v1/models") == 401
    assert status(f"{url}/v1/models", "s3cret") == 503
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "s3cret" not in errors


def test_router_tells_of_a_port_in_use(router: tuple[subprocess.Popen[str], str]) -> None:
    port = router[1].rpartition(":")[2]
    assert port in refused("router", "--prefill", NOBODY, "--decode", NOBODY, "--port", port)


async def test_broker_ends_a_lease_at_its_owner() -> None:
    async with Agent(Config(lease_seconds=60)) as owner, AgentBroker(Config()) as broker:
        owner.register([np.zeros((8, 64), np.uint8)])
        ticket = owner.lease([1, 2])
        params = to_params(ticket, request_id="r", engine_id="e", tp_size=1, pp_size=1)
        await broker.release(json.loads(json.dumps(params)))
        assert "released" in await owner.lease_ended(ticket)
        assert owner.gauges()["leases"] == 0
        # Again, and for what is no ticket of ours: nothing happens, nothing is raised.
        await broker.release(params)


@pytest.mark.parametrize("params", [{}, {"remote_host": "h"}, {"remote_host": "h", "remote_port": 1, "pdc": "x"}])
async def test_broker_survives_foreign_params(params: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    async with AgentBroker(Config()) as broker:
        await broker.release(params)
    assert "cannot be released" in caplog.text
