"""What the doctor makes of Ascend's libraries, tools, files and variables. Not run on hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from pd_connector.doctor import ascend
from pd_connector.doctor.report import Row, State
from pd_connector.doctor.symbols import LIBRARIES, Found

ACL, METADEF, HIXL, HCCL = (library.name for library in LIBRARIES)


@pytest.mark.parametrize(
    ("row", "state", "found", "remedy"),
    [
        (ascend.library(Found(HIXL)), "ok", "all 9 symbols", ""),
        (ascend.library(Found(HIXL, "no such file")), "warn", "no such file", "hccl or a staged transport"),
        (ascend.library(Found(ACL, "no such file")), "warn", "no such file", "set_env.sh"),
        (ascend.library(Found(HCCL, "no such file")), "warn", "no such file", "stands in for hixl"),
        (ascend.library(Found(HCCL, missing=("HcclCommDestroy",))), "fail", "1 of 5 symbols", "9.1.0"),
        (ascend.library(Found(ACL, missing_optional=("aclrtMemcpy2dAsync",))), "ok", "aclrtMemcpy2dAsync", ""),
        (ascend.tools("/bin/npu-smi", "/bin/hccn_tool"), "ok", "/bin/npu-smi, /bin/hccn_tool", ""),
        (ascend.tools(None, "/bin/hccn_tool"), "warn", "no npu-smi", "docs/ascend.md"),
        (ascend.same_host({}), "ok", "HCCL_INTRA_ROCE_ENABLE=1 for both", ""),
        (ascend.same_host({"HCCL_INTRA_ROCE_ENABLE": "1"}), "ok", "RoCE, which needs an address", ""),
        (
            ascend.same_host({"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "1"}),
            "warn",
            "both 1",
            "unset one",
        ),
    ],
)
def test_what_is_made_of_a_finding(row: Row, state: str, found: str, remedy: str) -> None:
    assert row.state == state
    assert found in row.found
    assert remedy in row.remedy
    assert bool(row.remedy) == (row.state is not State.OK)


@pytest.mark.parametrize(
    ("devices", "present", "visible", "chips"),
    [
        ((0, 1), (0, 1, 2, 3), None, [0, 1]),
        ((0, 1), (4, 5), None, [4, 5]),
        ((0, 1), (0, 1, 2, 3), "3,1", [3, 1]),
        ((0, 1), (4, 5, 6), "2,0", [6, 4]),
        ((0, 0), (4,), None, [4]),
        ((0, 1), (), None, [0, 1]),
        ((2,), (0, 1, 2), "1,0", [2]),
        ((0,), (0, 1), "nonsense", [0]),
        ((0,), (0, 1), "", [0]),
    ],
)
def test_chips_behind_device_numbers(
    devices: tuple[int, ...], present: tuple[int, ...], visible: str | None, chips: list[int]
) -> None:
    assert ascend.physical(devices, present, visible) == chips


def tool(folder: Path, script: str) -> str:
    path = folder / "hccn_tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "states", "found"),
    [
        ("case $3 in -link) echo link status: UP;; -ip) echo ipaddr:10.0.0.1;; *) echo Success;; esac", "ooo", "UP"),
        ("echo link status: DOWN", "www", "DOWN"),
        ("echo; echo ' one '; echo two >&2", "www", "one | two"),
        ("printf '\\377\\376'", "www", ""),
        ("exit 3", "www", "ended with status 3"),
    ],
)
def test_what_hccn_tool_says_is_shown_as_it_is(tmp_path: Path, script: str, states: str, found: str) -> None:
    rows = ascend.network(tool(tmp_path, script), 5)
    assert "".join(row.state[0] for row in rows) == states
    assert found in rows[0].found
    assert [row.name for row in rows] == ["NPU 5 link", "NPU 5 network", "NPU 5 address"]
    assert all(row.remedy or row.state is State.OK for row in rows)


def test_a_tool_that_hangs_or_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "_TOOL_S", 0.3)
    assert "did not answer within 0.3 s" in ascend.network(tool(tmp_path, "exec sleep 30"), 0)[0].found
    assert "cannot be run" in ascend.network(str(tmp_path), 0)[0].found


def test_where_there_is_nothing_there_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "_ROOT", tmp_path / "none")
    monkeypatch.setattr(ascend, "_HCCN_TOOL", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = [Found(library.name, "no such file") for library in LIBRARIES]
    assert [row.state for row in ascend.rows(absent, (), {})] == ["ok"]
    assert len(ascend.rows([Found(ACL), *absent[1:]], (), {})) == len(LIBRARIES) + 2


@pytest.mark.parametrize(
    ("text", "number"),
    [("Version=26.0.RC1\n", "26.0.RC1"), ("[x]\ntoolkit_running_version=[9.1.0:9.1]\n", "9.1.0:9.1")],
)
def test_versions_come_with_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, number: str
) -> None:
    monkeypatch.setattr(ascend, "_ROOT", tmp_path / "none")
    (tmp_path / "version.cfg").write_text(text)
    told = ascend.versions({"ASCEND_HOME_PATH": str(tmp_path)})
    assert told == {"CANN": f"{number} ({tmp_path / 'version.cfg'})", "ASCEND_HOME_PATH": str(tmp_path)}
