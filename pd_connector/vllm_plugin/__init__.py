"""vLLM plugin: registers ``PDConnector``. Installing the package is all that is needed."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

NAME = "PDConnector"
_MODULE = "pd_connector.vllm_plugin.connector"


def register() -> None:
    """Entry point ``vllm.general_plugins``: called in every vLLM process, more than once. Never raises."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        if NAME not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(NAME, _MODULE, NAME)
    except Exception as error:  # a broken plugin must not take an engine down that does not use it
        logger.warning("%s is not available in this vLLM: %s", NAME, error)


def __getattr__(name: str) -> Any:
    """``kv_connector_module_path: "pd_connector.vllm_plugin"`` finds the class here."""
    if name == NAME:
        from pd_connector.vllm_plugin.connector import PDConnector

        return PDConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
