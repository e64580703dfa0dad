"""vLLM's own NixlConnector in a pair of instances, for the hand-over benchmark: NIXL comes from rivals/venvs.py."""

from __future__ import annotations

import json
from pathlib import Path

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


def nixl_instance(name: str, model: Path, directory: Path, role: str, core: int, arguments: list[str]) -> Instance:
    """As shipped: nothing is tuned. ``core`` as in vllm_instance."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    only = directory / "nixl-only"
    return vllm_instance(
        name,
        model,
        directory / f"{name}.log",
        core=core,
        arguments=[*arguments, "--kv-transfer-config", json.dumps(transfer)],
        environment={
            "PYTHONPATH": str(only if only.exists() else libraries(directory)),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_SERVER_DEV_MODE": "1",
        },
    )
