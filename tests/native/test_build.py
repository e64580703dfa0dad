"""What is built with a compiler, without one, and when it was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pd_connector.memory import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc", "pd_connector")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def wheel(tree: Path) -> Path:
    (found,) = (tree / "dist").glob("*.whl")
    return found


@pytest.mark.skipif(shutil.which("cc") is None, reason="NO C COMPILER: the extension is not built here")
def test_with_a_compiler_one_wheel_serves_every_python(tree: Path) -> None:
    done = build(tree, PD_NATIVE="require")
    assert done.returncode == 0, done.stderr
    assert "-cp311-abi3-linux_" in wheel(tree).name
    assert "pd_connector/_native.abi3.so" in zipfile.ZipFile(wheel(tree)).namelist()


def test_without_a_compiler_a_pure_package_moves_blocks_over_zmq(tree: Path, tmp_path: Path) -> None:
    done = build(tree, CC="no-such-compiler", PD_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    assert "this is a pure Python package" in done.stderr
    assert wheel(tree).name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel(tree)).extractall(site)
    assert not list(site.rglob("*.so"))
    # -S: without the finder of an editable install, which would lend this package the other one's extension.
    packages = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    example = subprocess.run(
        [sys.executable, "-S", ROOT / "examples" / "custom_engine.py"],
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "98304 bytes over zmq, all equal" in example.stdout, example.stderr


def test_a_required_extension_that_cannot_be_built_is_an_error(tree: Path) -> None:
    assert build(tree, CC="no-such-compiler", PD_NATIVE="require").returncode != 0
    assert not (tree / "dist").exists()
    wrong = build(tree, PD_NATIVE="maybe")
    assert wrong.returncode != 0
    assert "use auto, require or off" in wrong.stderr


@pytest.mark.skipif(not Path("/usr/include/infiniband/verbs.h").exists(), reason="no header of libibverbs")
def test_our_declarations_of_libibverbs_are_the_real_ones() -> None:
    source = ROOT / "tests/native/ibverbs_abi.c"
    done = subprocess.run(["cc", "-std=c11", "-D_GNU_SOURCE", "-fsyntax-only", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_WITHOUT = """
from pd_connector import _native
reason = _native.probe("verbs")
print(reason)
from pd_connector.transport import registry
print(registry.available({})["verbs"], registry.available({})["tcp"])
"""


@pytest.mark.skipif(native() is None, reason="the C extension was not built")
def test_without_libibverbs_everything_else_works(tmp_path: Path) -> None:
    """A library of that name that is none stands before the real one, if there is one."""
    (tmp_path / "libibverbs.so.1").write_bytes(b"no library")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, env=environment, check=True)
    reason, rest = done.stdout.splitlines()
    assert "libibverbs.so.1 cannot be opened" in reason
    assert "libibverbs.so.1 cannot be opened" in rest
    assert rest.endswith("None"), "tcp can be used"
