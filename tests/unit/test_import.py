"""`import pd_connector` is cheap: it loads neither torch nor vllm nor any C extension of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import json, sys
import pd_connector
print(json.dumps({name: getattr(module, "__file__", None) for name, module in sys.modules.items()}))
"""


def heavy_modules(path: Path) -> list[str]:
    """Modules that importing the pd_connector found first at path loads in a fresh interpreter, but must not."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=path, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, str | None] = json.loads(done.stdout)
    assert Path(loaded["pd_connector"] or "").is_relative_to(path)
    return sorted(
        name
        for name, file in loaded.items()
        if name.split(".")[0] in ("torch", "vllm")
        or (name.split(".")[0] == "pd_connector" and (file or "").endswith(tuple(EXTENSION_SUFFIXES)))
    )


def test_import_loads_nothing_heavy() -> None:
    assert heavy_modules(ROOT) == []


@pytest.mark.parametrize("heavy", ["torch", "vllm"])
def test_a_heavy_import_is_noticed(heavy: str, tmp_path: Path) -> None:
    (tmp_path / f"{heavy}.py").touch()
    (tmp_path / "pd_connector").mkdir()
    (tmp_path / "pd_connector" / "__init__.py").write_text(f"import {heavy}\n")
    assert heavy_modules(tmp_path) == [heavy]


def test_an_extension_of_ours_is_noticed(tmp_path: Path) -> None:
    """A real extension, copied from the standard library under our package's roof."""
    import _json  # built as a shared object or into the interpreter, by how Python was built

    built_in = getattr(_json, "__file__", None)
    if built_in is None:
        pytest.skip("this Python has _json built in, so there is no shared object to borrow")
    package = tmp_path / "pd_connector"
    package.mkdir()
    (package / f"_json{EXTENSION_SUFFIXES[0]}").write_bytes(Path(built_in).read_bytes())
    (package / "__init__.py").write_text("from pd_connector import _json\n")
    assert heavy_modules(tmp_path) == ["pd_connector._json"]
