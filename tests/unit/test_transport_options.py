"""What an agent's own address means for its transports."""

from __future__ import annotations

from pd_connector import Config
from pd_connector.runtime.courier import transport_options
from pd_connector.transport import registry


def test_every_transport_that_listens_is_told_the_agents_address() -> None:
    config = Config(host="0.0.0.0", advertise="10.0.0.7", insecure=True, transport_options={"hixl": {"device": 3}})
    options = transport_options(config)
    for name in ("verbs", "hixl", "hccl", "tcp", "zmq", "staged-verbs", "staged-tcp", "staged-zmq"):
        assert (options[name]["host"], options[name]["advertise"]) == ("0.0.0.0", "10.0.0.7"), name
    assert options["hixl"]["device"] == 3
    assert "host" not in options["shm"]
    assert set(options) <= set(registry.known())
