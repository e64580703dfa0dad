"""vLLM's own NixlConnector in a pair of instances, for the hand-over benchmark: NIXL comes from rivals/venvs.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from rivals import venvs

from pd_connector.demo.instance import Instance, free_port, vllm_instance


def libraries(directory: Path) -> Path:
    """A folder with NIXL and nothing else of its environment, whose numpy is not vLLM's. Raises FileNotFoundError."""
    python = venvs.python_of("nixl")
    if python is None:
        raise FileNotFoundError("NIXL is not installed: run benchmarks/rivals/venvs.py")
    (site,) = (python.parents[1] / "lib").glob("python3*/site-packages")
    made = directory / "nixl-only"
    made.mkdir()
    for entry in site.glob("nixl*"):
        (made / entry.name).symlink_to(entry)
    return made


class StampedBy(NamedTuple):
    """A class of stamped_connector.py around the connector, and its environment."""

    connector: str
    environment: dict[str, str]


def nixl_instance(
    name: str,
    model: Path,
    directory: Path,
    role: str,
    core: int,
    arguments: list[str],
    stamped: StampedBy | None = None,
) -> Instance:
    """As shipped: nothing is tuned. ``core`` as in vllm_instance."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    only = directory / "nixl-only"
    paths = [str(only if only.exists() else libraries(directory))]
    if stamped is not None:
        transfer |= {"kv_connector": stamped.connector, "kv_connector_module_path": "stamped_connector"}
        paths.insert(0, str(Path(__file__).parent))
    return vllm_instance(
        name,
        model,
        directory / f"{name}.log",
        core=core,
        arguments=[*arguments, "--kv-transfer-config", json.dumps(transfer)],
        environment={
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_SERVER_DEV_MODE": "1",
            **({} if stamped is None else stamped.environment),
        },
    )
