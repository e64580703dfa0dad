"""Guests with Soft-RoCE, emulated: a real verbs stack where the host's kernel has none. Needs no rights on the host.

    python tests/rdma_vm/guest.py COMMAND...      runs one command in one guest, as root, and ends as it did

A guest sees the host's files as they were when it started; what it writes is lost, but for /run/job. Its device is
``rxe0``, on eth0, 10.77.0.N, with MTU 9000. Two guests may share a cable.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from image import Image, NoGuests, prepare

BOOT_S = 180.0
_NUMPY = "NPY_DISABLE_CPU_FEATURES='AVX2 X86_V3'"
"""Numpy sorts wrongly, or crashes, with AVX2 as QEMU 7.2 emulates it; the names of older and newer versions."""
_START = """\
ulimit -l unlimited
ip link set lo up
ip addr add 10.77.0.{index}/24 dev eth0
ip link set eth0 mtu 9000
ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0 || echo 'guest: no rxe0'
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
export PATH={path} PYTHONDONTWRITEBYTECODE=1 {numpy}
cd {folder}
echo up >/run/job/up
{command} </dev/null >/run/job/out 2>&1
rc=$?
dmesg 2>/dev/null | grep segfault >>/run/job/out
echo $rc >/run/job/status
sync
echo b >/proc/sysrq-trigger
read never </dev/console
"""


@dataclass
class Guest:
    """``link``: a unix socket that stands for the cable, and whether this guest makes it."""

    image: Image
    command: Sequence[str]
    index: int = 1
    link: tuple[Path, bool] | None = None
    memory: str = "2G"
    job: Path = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)
    _shown: int = 0

    def start(self) -> None:
        self.job = Path(tempfile.mkdtemp(prefix="pdc-guest-"))
        words = _START.format(
            index=self.index,
            path=shlex.quote(os.environ["PATH"]),
            folder=shlex.quote(os.getcwd()),
            command=shlex.join(self.command),
            numpy=_NUMPY,
        )
        (self.job / "start").write_text(words)
        (self.job / "out").touch()
        with (self.job / "qemu").open("wb") as errors:
            self._process = subprocess.Popen(self._words(), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)

    def _words(self) -> list[str]:
        net = "user,id=n0,restrict=on"
        if self.link is not None:
            net = f"stream,id=n0,server={'on' if self.link[1] else 'off'},addr.type=unix,addr.path={self.link[0]}"
        share = "local,path={},mount_tag={},security_model=none"
        return [
            *(
                "qemu-system-x86_64",
                "-accel",
                _accelerator(),
                "-cpu",
                "max",
                "-M",
                "q35",
                "-smp",
                "2",
                "-m",
                self.memory,
            ),
            *("-display", "none", "-monitor", "none", "-nodefaults", "-no-reboot"),
            *("-serial", f"file:{self.job / 'console'}"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable net.ifnames=0"),
            *("-virtfs", share.format("/", "host") + ",readonly=on,multidevs=remap"),
            *("-virtfs", share.format(self.job, "job")),
            *("-netdev", net),
            *("-device", f"virtio-net-pci,netdev=n0,mac=52:54:00:77:00:{self.index:02x},host_mtu=9000,romfile="),
        ]

    def show(self, put: Callable[[str], None]) -> None:
        """What the command has said since the last call, whole lines."""
        with (self.job / "out").open("rb") as out:
            out.seek(self._shown)
            fresh = out.read()
        cut = fresh.rfind(b"\n") + 1 if self._process.poll() is None else len(fresh)
        self._shown += cut
        for line in fresh[:cut].decode(errors="replace").splitlines():
            put(line)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def status(self) -> int:
        """Of the command. Raises NoGuests when the guest ended without one."""
        try:
            return int((self.job / "status").read_text())
        except (OSError, ValueError) as error:
            words = [(self.job / name).read_text(errors="replace")[-2000:] for name in ("qemu", "console")]
            raise NoGuests(f"guest {self.index} ended without a status: {' '.join(words).strip()}") from error

    def up(self) -> bool:
        return (self.job / "up").exists()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.job, ignore_errors=True)


def run(guests: Sequence[Guest], seconds: float, put: Callable[[Guest, str], None]) -> list[int]:
    """The statuses of the guests' commands, all started at once. Raises NoGuests when one does not boot or ends early,
    TimeoutError after ``seconds``."""
    end, boot = time.monotonic() + seconds, time.monotonic() + BOOT_S
    try:
        for guest in guests:
            guest.start()
            while guest.link is not None and not guest.link[0].exists() and time.monotonic() < boot:
                time.sleep(0.05)
        while not all(guest.ended() for guest in guests):
            time.sleep(0.3)
            for guest in guests:
                guest.show(lambda line, guest=guest: put(guest, line))  # type: ignore[misc]
                if not guest.up() and (guest.ended() or time.monotonic() > boot):
                    guest.status()
                    raise NoGuests(f"guest {guest.index} did not come up within {BOOT_S:g} s")
            if time.monotonic() > end:
                raise TimeoutError(f"a guest's command took more than {seconds:g} s")
        for guest in guests:
            guest.show(lambda line, guest=guest: put(guest, line))  # type: ignore[misc]
        return [guest.status() for guest in guests]
    finally:
        for guest in guests:
            if hasattr(guest, "_process"):
                guest.close()


def pair(
    image: Image, first: Sequence[str], second: Sequence[str], seconds: float, put: Callable[[Guest, str], None]
) -> list[int]:
    """Two guests on one cable: 10.77.0.1 and 10.77.0.2."""
    with tempfile.TemporaryDirectory(prefix="pdc-cable-") as folder:
        cable = Path(folder) / "cable"
        return run([Guest(image, first, 1, (cable, True)), Guest(image, second, 2, (cable, False))], seconds, put)


def _accelerator() -> str:
    """KVM only where the processor has what an ordinary kernel needs of it."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return "kvm" if flags & {"vmx", "svm"} and os.access("/dev/kvm", os.W_OK) else "tcg,thread=multi"


def main() -> int:
    try:
        (status,) = run([Guest(prepare(), sys.argv[1:] or ["sh"])], 3600, lambda guest, line: print(line, flush=True))
    except (NoGuests, TimeoutError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 125
    return status


if __name__ == "__main__":
    sys.exit(main())
