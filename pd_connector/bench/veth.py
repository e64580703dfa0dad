"""Two network namespaces of this host, joined by a veth pair: what two hosts are to TCP, less the wire. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import subprocess
from collections.abc import Iterator

from pd_connector.errors import ConfigError

SPACE, HERE, THERE = "pdc-bench", "10.231.7.1", "10.231.7.2"
PATH = f"/run/netns/{SPACE}"
CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def pair() -> Iterator[None]:
    """Inside, THERE is an address in the namespace of the file PATH, which this process reaches from HERE.

    Raises ConfigError where that cannot be made."""
    with _alone():
        _ip(f"netns delete {SPACE}", check=False)  # of a run that was killed
        _ip(f"netns add {SPACE}")
        try:
            _ip(f"link add pdcb0 type veth peer name pdcb1 netns {SPACE}")
            _ip(f"address add {HERE}/30 dev pdcb0")
            _ip("link set pdcb0 up")
            _ip(f"-n {SPACE} address add {THERE}/30 dev pdcb1")
            _ip(f"-n {SPACE} link set pdcb1 up")
            _ip(f"-n {SPACE} link set lo up")
            yield
        finally:
            _ip(f"netns delete {SPACE}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Names and addresses are fixed: one at a time."""
    try:
        lock = os.open("/run/pdc-bench.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"two network namespaces need root: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError("another benchmark between two network namespaces is running: wait for its end") from None
    else:
        yield
    finally:
        os.close(lock)


def enter() -> None:
    """Move this thread, and threads it starts, into the other namespace. Raises OSError."""
    space = os.open(PATH, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(space, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", PATH)
    finally:
        os.close(space)


def _ip(words: str, *, check: bool = True) -> None:
    try:
        subprocess.run(["ip", *words.split()], check=check, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        raise ConfigError("two network namespaces need the `ip` command: install iproute2") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        raise ConfigError(f"`ip {words}` failed: {why}; two network namespaces need root and iproute2") from None
