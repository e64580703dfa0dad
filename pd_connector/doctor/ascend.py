"""Ascend's software and NPUs on this host, as far as files, tools and libraries tell. Not run on an NPU by us."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pd_connector.doctor.limits import read
from pd_connector.doctor.report import Row, State
from pd_connector.doctor.symbols import LIBRARIES, Found

_NAME, _TOOLS, _SAME_HOST = "Ascend", "Ascend tools", "same-host RoCE"
_TOOL_S = 3.0
_ROOT = Path("/usr/local/Ascend")
_HCCN_TOOL = _ROOT / "driver/tools/hccn_tool"
_RAW_CHARACTERS = 200
_HIXL = ("libmetadef.so", "libcann_hixl.so")
_ENVIRONMENT = "source set_env.sh of the CANN toolkit (/usr/local/Ascend/ascend-toolkit/set_env.sh), or install CANN"


def versions(settings: Mapping[str, str]) -> dict[str, str]:
    """Of driver, firmware and CANN, each with the file that says so. ``settings``: config.ascend_settings()."""
    home = [Path(settings["ASCEND_HOME_PATH"])] if "ASCEND_HOME_PATH" in settings else []
    toolkits = [*home, _ROOT / "ascend-toolkit/latest", _ROOT / "cann", _ROOT / "latest"]
    infos = [
        path for kit in toolkits for path in (kit / "version.cfg", *sorted(kit.glob("*/ascend_toolkit_install.info")))
    ]
    places = {
        "NPU driver": [_ROOT / "driver/version.info"],
        "NPU firmware": [_ROOT / "firmware/version.info"],
        "CANN": infos,
    }
    found = {name: next(filter(None, map(_version, paths)), "") for name, paths in places.items()}
    return {name: words for name, words in found.items() if words} | dict(settings)


def _version(path: Path) -> str:
    text = read(path)
    number = re.search(r"^\s*(?:\w*_)?version\s*=\s*\[?([^\s\]]+)", text, re.IGNORECASE | re.MULTILINE)
    return f"{number[1]} ({path})" if number else ""


def rows(found: Sequence[Found], chips: Sequence[int], settings: Mapping[str, str]) -> list[Row]:
    """One row only where there is nothing of Ascend's: nobody needs it. ``chips`` by the numbers of ``physical``."""
    smi, tool = shutil.which("npu-smi"), shutil.which("hccn_tool") or (str(_HCCN_TOOL) if _HCCN_TOOL.exists() else None)
    if all(each.problem for each in found) and not (smi or tool or chips or _ROOT.exists()):
        return [Row(_NAME, State.OK, "none: no NPU, no CANN, no driver")]
    made = [library(each) for each in found]
    made.append(tools(smi, tool))
    for chip in chips if tool else ():
        made += network(tool or "", chip)
    made.append(same_host(settings))
    return made


def library(found: Found) -> Row:
    """A row for one library: every symbol that our extension looks up is there, or which are not."""
    known = next(each for each in LIBRARIES if each.name == found.library)
    count = len(known.needed) + len(known.optional)
    if found.problem:
        return Row(found.library, State.WARN, f"cannot be opened: {found.problem}", _without(found.library))
    if found.missing:
        words = f"{len(found.missing)} of {count} symbols are missing: {', '.join(found.missing)}"
        return Row(
            found.library,
            State.FAIL,
            words,
            f"it is of another CANN version; 9.1.0 is known. {_without(found.library)}",
        )
    if found.missing_optional:
        words = f"all that is needed; missing, and done in another way: {', '.join(found.missing_optional)}"
        return Row(found.library, State.OK, words)
    return Row(found.library, State.OK, f"all {count} symbols are there")


def _without(name: str) -> str:
    if name in _HIXL:
        return f"without it there is no hixl, then hccl or a staged transport is taken; {_ENVIRONMENT}"
    if name == "libhccl.so":
        return f"without it there is no hccl, which only stands in for hixl; {_ENVIRONMENT}"
    return f"without it no memory of an NPU can be used; {_ENVIRONMENT}"


def tools(smi: str | None, tool: str | None) -> Row:
    words = ", ".join(path if path else f"no {name}" for name, path in (("npu-smi", smi), ("hccn_tool", tool)))
    if smi and tool:
        return Row(_TOOLS, State.OK, words)
    return Row(
        _TOOLS, State.WARN, words, "mount the driver's tools from the host (docs/ascend.md): they tell about links"
    )


def network(tool: str, chip: int) -> list[Row]:
    """What hccn_tool says of one NPU's own network port: RoCE needs it, HCCS does not."""
    asked = (
        ("link", "-link", r"\bUP\b", "look at the cable and the switch; HCCS does without it"),
        (
            "network",
            "-net_health",
            r"success",
            f"give it an address to try: hccn_tool -i {chip} -netdetect -s address IP",
        ),
        (
            "address",
            "-ip",
            r"ipaddr\s*:\s*\S+",
            f"hccn_tool -i {chip} -ip -s address IP netmask MASK; HCCS does without it",
        ),
    )
    made = []
    for name, option, good, remedy in asked:
        said = _ask([tool, "-i", str(chip), option, "-g"])
        state = State.OK if re.search(good, said, re.IGNORECASE) else State.WARN
        made.append(Row(f"NPU {chip} {name}", state, said, "" if state is State.OK else remedy))
    return made


def _ask(command: list[str]) -> str:
    """The tool's own words in one line."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TOOL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)} did not answer within {_TOOL_S:g} s"
    except OSError as error:
        return f"{command[0]} cannot be run: {error}"
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines()]
    return (
        " | ".join(filter(None, lines))[:_RAW_CHARACTERS] or f"{' '.join(command)} ended with status {done.returncode}"
    )


def same_host(settings: Mapping[str, str]) -> Row:
    """Which way NPUs of one host read each other."""
    roce, pcie = (settings.get(f"HCCL_INTRA_{way}_ENABLE") == "1" for way in ("ROCE", "PCIE"))
    if roce and pcie:
        words = "HCCL_INTRA_ROCE_ENABLE and HCCL_INTRA_PCIE_ENABLE are both 1, which HCCL does not allow"
        return Row(_SAME_HOST, State.WARN, words, "unset one of them")
    if roce:
        return Row(_SAME_HOST, State.OK, "HCCL_INTRA_ROCE_ENABLE=1: RoCE, which needs an address on both NPUs")
    advice = "where hixl fails between them, set HCCL_INTRA_ROCE_ENABLE=1 for both instances"
    return Row(_SAME_HOST, State.OK, f"HCCL_INTRA_ROCE_ENABLE is not 1: NPUs of one host use HCCS or PCIe; {advice}")


def physical(devices: Sequence[int], present: Sequence[int], visible: str | None) -> list[int]:
    """The chips behind device numbers as processes count them: ASCEND_RT_VISIBLE_DEVICES (``visible``) chooses among
    those ``present`` (/dev/davinciN). A number that cannot be resolved stands for itself."""
    chosen = [int(each) for each in visible.split(",")] if visible and re.fullmatch(r"\d+(,\d+)*", visible) else None
    made = []
    for device in devices:
        index = chosen[device] if chosen is not None and device < len(chosen) else device
        made.append(present[index] if index < len(present) else index)
    return list(dict.fromkeys(made))


def present() -> list[int]:
    return sorted(int(path.name[7:]) for path in Path("/dev").glob("davinci[0-9]*") if path.name[7:].isdigit())
