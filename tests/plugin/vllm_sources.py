"""The Python sources of a published vLLM, taken out of its wheel without downloading the rest of it.

pip says where the configured package index has the wheel; its table of contents and the Python files are read by HTTP
range requests (about 10 MB of several hundred) and kept under build/vllm-sources/VERSION.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from functools import cached_property
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "vllm-sources"
_AHEAD = 1 << 20
"""Bytes per request: Python files lie side by side in a wheel."""
_SECONDS = 60


class Unavailable(Exception):
    """The index, or its answer to range requests, is not there."""


def sources(version: str) -> Path:
    """A directory that holds the package ``vllm`` of that version, Python files only. Raises Unavailable."""
    kept = CACHE / version
    if not kept.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=CACHE))
        try:
            _extract(_address(version), unfinished)
            unfinished.rename(kept)
        except (OSError, zipfile.BadZipFile) as error:
            if not kept.is_dir():  # another process may have been faster
                raise Unavailable(f"vllm {version} cannot be read from the package index: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return kept


def _address(version: str) -> str:
    """Where the index has the wheel; pip fetches no more than its metadata for that."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        order = [
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
            "--only-binary", ":all:", "--report", str(report), f"vllm=={version}",
        ]  # fmt: skip
        try:
            done = subprocess.run(order, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"pip did not find vllm {version} within {_SECONDS} s") from error
        if done.returncode:
            raise Unavailable(f"pip does not find vllm {version}: {done.stderr[-500:]}")
        found: str = json.loads(report.read_text())["install"][0]["download_info"]["url"]
    return found


def _extract(url: str, into: Path) -> None:
    with zipfile.ZipFile(io.BufferedReader(RangeFile(url), _AHEAD)) as wheel:
        wanted = [one for one in wheel.infolist() if one.filename.startswith("vllm/") and one.filename.endswith(".py")]
        for member in sorted(wanted, key=lambda one: one.header_offset):
            wheel.extract(member, into)


class RangeFile(io.RawIOBase):
    """A file behind a URL, of which only what is read is fetched."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @cached_property
    def _size(self) -> int:
        with self._open({}, "HEAD") as answer:
            if answer.headers.get("Accept-Ranges") != "bytes":
                raise OSError("the package index does not serve parts of files")
            return int(answer.headers["Content-Length"])

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        with self._open({"Range": f"bytes={self._at}-{end - 1}"}) as answer:
            if answer.status != 206:
                raise OSError(f"the package index answered {answer.status} instead of a part of the file")
            piece = answer.read()
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _open(self, headers: dict[str, str], method: str = "GET"):  # type: ignore[no-untyped-def]
        request = urllib.request.Request(self._url, headers=headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=_SECONDS)
        except urllib.error.URLError as error:
            raise OSError(f"{error}") from error
