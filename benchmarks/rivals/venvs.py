"""One virtual environment for each rival under build/rivals; silent and instant when there is nothing to do.

python benchmarks/rivals/venvs.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "rivals"
WHEELS = {
    "nixl": ("nixl==1.5.1", "nixl-cu12==1.5.1", "numpy==2.3.5"),
    "mooncake": ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy==2.3.5"),
}
IMPORTS = {"nixl": "import numpy, nixl._api", "mooncake": "import numpy, mooncake.engine"}
STEP_S = 900.0


def python_of(name: str) -> Path | None:
    """The interpreter of a rival's environment; None where it is not installed as pinned here."""
    python = FOLDER / name / "bin" / "python"
    stamp = FOLDER / name / "installed"
    return python if stamp.exists() and stamp.read_text() == "\n".join(WHEELS[name]) else None


def make(name: str) -> None:
    """Make one environment. Raises RuntimeError with one line that says what is missing."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not (folder / "bin" / "pip").exists():
        _step(name, sys.executable, "-m", "venv", folder)
    # Without dependencies: they are torch, a second build of NIXL and clients of services, none of which a read needs.
    _step(name, python, "-m", "pip", "install", "-q", "--only-binary", ":all:", "--no-deps", *WHEELS[name])
    _step(name, python, "-c", IMPORTS[name])
    (folder / "installed").write_text("\n".join(WHEELS[name]))


def _step(name: str, *words: object) -> None:
    command = [str(word) for word in words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_S, cwd=FOLDER.parent)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{name} is missing: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise RuntimeError(f"{name} is missing: {' '.join(command[1:4])} ... said: {said[-1]}")


def main() -> int:
    """0 when every rival is installed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = 0
    for name in WHEELS:
        if python_of(name):
            continue
        try:
            make(name)
        except RuntimeError as error:
            print(error)
            missing = 1
    return missing


if __name__ == "__main__":
    sys.exit(main())
