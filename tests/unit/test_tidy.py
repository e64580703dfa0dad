"""The repository is tidy, and every check that says so can fail."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tidy

ROOT = Path(__file__).resolve().parents[2]
Check = Callable[[Path], list[str]]

PYPROJECT = '[project.scripts]\npdc = "pd_connector.cli:main"\n'
CLEAN = {
    "pyproject.toml": PYPROJECT,
    "pd_connector/cli.py": "def main():\n    return ast.literal_eval('1')\n",
    "pd_connector/config.py": "import os\n\nhome = os.environ.get('HOME')\n",
    "tests/test_it.py": "import os\n\nos.environ['A'] = '1'\n",
    "README.md": "# One\n## Two\n",
    "README_zh.md": "# 一\n## 二\n",
    "docs/paths.md": "see /usr/local/bin, ./work/x, https://example.com/work/x and $(TMP)/work/x\n",
}
# Every plant replaces or adds one file; the parts are joined here so that this file itself stays tidy.
PLANTS: list[tuple[Check, str, str]] = [
    (tidy.long_files, "pd_connector/long.py", "x = 1\n" * 501),
    (tidy.long_files, "csrc/long.h", "int x;\n" * 501),
    (tidy.long_functions, "pd_connector/long.py", "async def f():\n" + "    x = 1\n" * 70),
    (tidy.unsafe_code, "pd_connector/bad.py", "def f():\n    import pickle\n"),
    (tidy.unsafe_code, "pd_connector/bad.py", "from pickle import loads\n"),
    (tidy.unsafe_code, "tests/bad.py", "eval('1')\n"),
    (tidy.unsafe_code, "tests/bad.py", "exec('1')\n"),
    (tidy.unsafe_code, "scripts/bad.py", "import yaml\n\nyaml.load('1')\n"),
    (tidy.unfinished_marks, "docs/a.md", "TO" + "DO: write this\n"),
    (tidy.unfinished_marks, "Makefile", "# FIX" + "ME\n"),
    (tidy.unfinished_marks, "pd_connector/a.py", "# XX" + "X\n"),
    (tidy.machine_paths, "docs/a.md", "in /" + "work/main\n"),
    (tidy.machine_paths, "pd_connector/a.py", "sock = 'ipc:///" + "tmp/x'\n"),
    (tidy.machine_paths, "docs/a.md", "`/" + "home/me/x`\n"),
    (tidy.registry_hosts, "Makefile", "# from https://pypi." + "org/simple\n"),
    (tidy.registry_hosts, "docs/a.md", "deb." + "debian." + "org\n"),
    (tidy.tabs, "pd_connector/a.py", "if x:\n\ty = 1\n"),
    (tidy.readme_headings, "README_zh.md", "# 一\n"),
    (tidy.dangling_entry_points, "pyproject.toml", PYPROJECT.replace("cli", "gone")),
    (tidy.dangling_entry_points, "pyproject.toml", PYPROJECT.replace("main", "gone")),
    (tidy.environment_reads, "pd_connector/a.py", "import os\n\nx = os.environ['A']\n"),
    (tidy.environment_reads, "pd_connector/a.py", "import os\n\nx = os.getenv('A')\n"),
    (tidy.environment_reads, "pd_connector/demo/a.py", "from os import environ\n"),
]


def repository(root: Path, files: dict[str, str]) -> Path:
    """A real git repository at root that tracks these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True, timeout=30)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True, timeout=30)
    return root


@pytest.mark.parametrize("check", tidy.CHECKS)
def test_this_repository_is_tidy(check: Check) -> None:
    assert check(ROOT) == []


@pytest.mark.parametrize("check", tidy.CHECKS)
def test_a_clean_repository_passes(check: Check, tmp_path: Path) -> None:
    assert check(repository(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(("check", "name", "text"), PLANTS)
def test_a_plant_is_found(check: Check, name: str, text: str, tmp_path: Path) -> None:
    findings = check(repository(tmp_path, CLEAN | {name: text}))
    assert len(findings) == 1
    assert name.split("/")[-1] in findings[0]


def test_every_check_has_a_plant() -> None:
    assert {check for check, _, _ in PLANTS} == set(tidy.CHECKS)


def test_only_tracked_files_count(tmp_path: Path) -> None:
    repository(tmp_path, CLEAN)
    (tmp_path / "scratch.py").write_text("eval('1')\n")
    assert tidy.unsafe_code(tmp_path) == []
