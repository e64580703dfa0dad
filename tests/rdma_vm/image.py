"""What a guest boots: Debian's stock kernel, unpacked and never installed, and a first file system with its modules.

Made once, in a folder of the user's cache. Needs Debian or a relative of it: apt, dpkg-deb, tar.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {  # what must be there → the package that brings it
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "rdma": "iproute2",
    "ib_read_bw": "perftest",
    "/usr/lib/*/libibverbs.so.1": "libibverbs1",
    "/usr/lib/*/libibverbs/librxe-rdmav*.so": "ibverbs-providers",
    "/usr/include/infiniband/verbs.h": "libibverbs-dev",
}
MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_net",
    "dummy",
    "crc32_generic",
    "rdma_rxe",
    "ib_uverbs",
)
_TREES = ("drivers/infiniband", "drivers/net", "drivers/virtio", "net", "fs", "crypto", "lib", "arch/x86/crypto")


class NoGuests(Exception):
    """Why no guest can be booted here."""


@dataclass(frozen=True)
class Image:
    kernel: Path
    initrd: Path


def cache() -> Path:
    root = os.environ.get("PDC_RDMA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(root) / "pd_connector-rdma"


def prepare() -> Image:
    """Raises NoGuests."""
    _install()
    name = _kernel_package()
    folder = cache() / name
    image = Image(folder / "vmlinuz", folder / f"initrd-{_version()}.gz")
    if not image.kernel.exists():
        _unpack(name, folder)
    if not image.initrd.exists():
        made = _initrd(folder)
        image.initrd.write_bytes(made)
    return image


def _version() -> str:
    """Of what the first file system is made of."""
    import hashlib

    return hashlib.sha256(init().encode() + repr(MODULES).encode()).hexdigest()[:12]


def init() -> str:
    return (Path(__file__).parent / "init.sh").read_text()


def _run(*words: str | Path, what: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=600, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoGuests(f"{what}: {error}") from error
    if done.returncode:
        raise NoGuests(f"{what}: {done.stderr.strip()[-500:] or f'exit status {done.returncode}'}")
    return done.stdout


def _there(wanted: str) -> bool:
    return bool(list(Path("/").glob(wanted[1:])) if wanted.startswith("/") else shutil.which(wanted))


def _install() -> None:
    missing = sorted({package for wanted, package in PACKAGES.items() if not _there(wanted)})
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoGuests(f"this host has no apt-get to install {', '.join(missing)} with")
    print(f"rdma-test: installing {', '.join(missing)}", flush=True)
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    _run(*sudo, "apt-get", "update", "-qq", what="apt-get update")
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    _run(*apt, *missing, what=f"installing {', '.join(missing)}")


def _kernel_package() -> str:
    words = _run("apt-cache", "depends", "linux-image-amd64", what="looking for a kernel")
    found = re.search(r"Depends: (linux-image-\S+)", words)
    if found is None:
        raise NoGuests("apt knows no linux-image-amd64")
    return found[1]


def _unpack(name: str, folder: Path) -> None:
    print(f"rdma-test: fetching {name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run("apt-get", "-qq", "download", name, what=f"downloading {name}", cwd=folder)
    (package,) = folder.glob("*.deb")
    version = name.removeprefix("linux-image-")
    patterns = [f"./lib/modules/{version}/kernel/{tree}/*" for tree in _TREES]
    unpack = (
        f"dpkg-deb --fsys-tarfile {package.name} | tar -x --wildcards ./boot/vmlinuz-{version} {' '.join(patterns)}"
    )
    _run("sh", "-ec", unpack, what=f"unpacking {name}", cwd=folder)
    package.unlink()
    (folder / "boot" / f"vmlinuz-{version}").rename(folder / "vmlinuz")


def _in_order(tree: Path) -> list[Path]:
    """The modules, each after those that it needs, as they say of themselves."""
    paths = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = paths.get(name.replace("-", "_"))
        if path is None:
            raise NoGuests(f"the kernel has no module {name}")
        if path in order:
            return
        needed = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in needed[1].decode().split(",") if needed and needed[1] else ():
            visit(other)
        order.append(path)

    for name in MODULES:
        visit(name)
    return order


def _initrd(folder: Path) -> bytes:
    busybox = shutil.which("busybox")
    assert busybox is not None
    files = {"init": init().encode(), "busybox": Path(busybox).read_bytes()}
    modules = _in_order(folder / "lib")
    files |= {f"modules/{path.name}": path.read_bytes() for path in modules}
    files["modules/order"] = "\n".join(path.name for path in modules).encode() + b"\n"
    folders = ["modules", "proc", "sys", "dev", "host", "job", "overlay", "new"]
    entries = [(name, 0o040755, b"") for name in folders] + [(name, 0o100755, data) for name, data in files.items()]
    packed = b"".join(_cpio(name, mode, data) for name, mode, data in entries) + _cpio("TRAILER!!!", 0, b"")
    return gzip.compress(packed, 1)


def _cpio(name: str, mode: int, data: bytes) -> bytes:
    """One entry of an archive in the "newc" format, which is what the kernel reads."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
