"""Vendors' libraries: what is looked up in them is what is documented, and nothing of ours needs them to load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pd_connector
from pd_connector.doctor.symbols import LIBRARIES
from pd_connector.memory import native

from .elf import asked

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("docs/ascend.md", "docs/ascend_zh.md")
EXTENSIONS = sorted(Path(pd_connector.__file__).parent.glob("_*.abi3.so"))
OTHERS = {"libibverbs.so.1", "libcuda.so.1"}
"""Of other vendors, opened in the same way."""
VENDORS = re.compile(r"^(acl[a-zA-Z]|Hccl|hccl|rt[A-Z]|ibv_|rdma_|cu[A-Z]|cuda[A-Z])|[0-9]hixl|[0-9]AscendString|^adxl")
SYSTEM = re.compile(r"^(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+|ld-linux-[\w-]+\.so\.\d)$")

Looked = dict[str, tuple[set[str], set[str]]]
"""By library: symbols that are needed, symbols that are optional."""

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="NO C COMPILER: the sources cannot be read")
needs_extension = pytest.mark.skipif(native() is None, reason="the C extension was not built")


def looked_up(source: Path) -> Looked:
    """By the C preprocessor: the tables are made with macros."""
    command = ["cc", "-E", "-P", "-D_GNU_SOURCE", str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    text = re.sub(r'"\s+"', "", text)
    tables: dict[str, tuple[set[str], set[str]]] = {}
    for name, body in re.findall(r"static const pd_symbol (\w+)\[\]\s*=\s*\{(.*?)\}\s*;", text, re.DOTALL):
        needed, optional = tables[name] = (set(), set())
        for symbol, flag in re.findall(r'\{\s*"(\w+)".*?,\s*(\w+)\s*\}', body, re.DOTALL):
            assert flag in ("0", "1", "true", "false"), flag
            (optional if flag in ("1", "true") else needed).add(symbol)
        assert needed, f"{source}: nothing is read of {name}"
    return {library: tables[name] for library, name in re.findall(r'pd_dl_open\("([\w.]+)",\s*(\w+),', text)}


@needs_compiler
def test_what_the_sources_look_up_is_what_the_doctor_checks() -> None:
    sources = [path for path in sorted((ROOT / "csrc").glob("*.c")) if 'pd_dl_open("' in path.read_text()]
    found: Looked = {}
    for source in sources:
        here = looked_up(source)
        assert here, f"{source}: nothing was found in it"
        for library, (needed, optional) in here.items():
            known = found.setdefault(library, (set(), set()))
            known[0].update(needed)
            known[1].update(optional)
    listed: Looked = {each.name: (set(each.needed), set(each.optional)) for each in LIBRARIES}
    assert {name: symbols for name, symbols in found.items() if name not in OTHERS} == listed
    assert found.keys() >= OTHERS


@pytest.mark.parametrize("page", DOCUMENTS)
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_documents_list_the_same(page: str, library: object) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    part = text.partition(f"\n### {library.name}\n")[2].partition("\n#")[0]  # type: ignore[attr-defined]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", part, re.MULTILINE)
    needed = {"needed", "必需"}
    assert {word for _, word in rows} <= needed | {"optional", "可选"}
    assert [name for name, word in rows if word in needed] == list(library.needed)  # type: ignore[attr-defined]
    assert [name for name, word in rows if word not in needed] == list(library.optional)  # type: ignore[attr-defined]


def test_the_document_about_cuda_lists_what_is_looked_up() -> None:
    needed, optional = looked_up(ROOT / "csrc" / "cuda.c")["libcuda.so.1"]
    text = (ROOT / "docs" / "cuda.md").read_text(encoding="utf-8").partition("### libcuda.so.1")[2]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)
    assert {name for name, word in rows if word == "needed"} == set(needed)
    assert {name for name, word in rows if word == "optional"} == set(optional)


@needs_extension
@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: path.name)
def test_no_vendor_is_linked_against(path: Path) -> None:
    found = asked(path)
    assert found.symbols, "the reader finds something"
    assert not [name for name in found.symbols if VENDORS.search(name)]
    assert not [name for name in found.libraries if not SYSTEM.match(name)]


def test_the_reader_and_its_pattern_would_notice(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("NO C COMPILER: no library can be made")
    names = ["aclrtMalloc", "HcclCommDestroy", "ibv_open_device", "cuMemAlloc_v2", "cudaMalloc"]
    names += [symbol for library in LIBRARIES for symbol in library.needed]
    source = tmp_path / "linked.c"
    lines = [f"extern int {name}(void);" for name in dict.fromkeys(names)]
    source.write_text("\n".join([*lines, f"int all(void) {{ return {' + '.join(f'{n}()' for n in names)}; }}"]))
    made = tmp_path / "linked.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, source], check=True, timeout=60)
    assert {name for name in asked(made).symbols if VENDORS.search(name)} == set(names)


IMPORTS = """
import pd_connector, pd_connector._native, ctypes
from pathlib import Path
ctypes.CDLL(str(Path(pd_connector.__file__).parent / "_hixl.abi3.so"))
print(Path("/proc/self/maps").read_text())
"""


@needs_extension
def test_the_package_imports_without_them(tmp_path: Path) -> None:
    """Files of their names that are no libraries stand before the real ones, if there are any."""
    names = [each.name for each in LIBRARIES] + ["libibverbs.so.1", "libcuda.so.1", "libcuda.so"]
    for name in names:
        (tmp_path / name).write_bytes(b"no library")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=environment, check=True, timeout=60
    )
    assert "_native.abi3.so" in done.stdout
    assert not [name for name in names if f"/{name}" in done.stdout]
