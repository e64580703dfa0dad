"""Settings that cannot work: the server ends by itself, and its log says what is wrong and what to do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pd_connector.demo.instance import vllm_instance

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_unknown_key_and_port_in_use(tmp_path: Path, model: Path) -> None:
    """Both at once, since a server takes its time to get so far."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = {"key": {"lease_second": 3}, "port": {"port": port}}
        servers = {
            name: vllm_instance(name, model, tmp_path / name, role="kv_both", core=core, extra=extra)
            for core, (name, extra) in enumerate(wrong.items())
        }
        try:
            for server in servers.values():
                server.start()
            for server in servers.values():
                assert server.process is not None
                assert server.process.wait(300) != 0
        finally:
            for server in servers.values():
                server.stop()
    logs = {name: server.log.read_text() for name, server in servers.items()}
    assert "unknown key 'lease_second'; did you mean 'lease_seconds'?" in logs["key"]
    assert f"cannot listen on 127.0.0.1 port {port}" in logs["port"]
    assert "choose a free port" in logs["port"]
