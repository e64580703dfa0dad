"""What a figure was measured on, and where figures go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """The machine, its load and the code, without anything that names a host."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, minimum and maximum."""
    rounded = [round(f(values), digits) for f in (statistics.median, min, max)]
    return dict(zip(("median", "min", "max"), rounded, strict=True))


def write(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Append rows to results/NAME.jsonl, each with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path, machine = RESULTS / f"{name}.jsonl", describe()
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, "machine": machine}) + "\n")
    return path


def report(name: str, rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Write rows, each with a "case", and print them."""
    path = write(name, rows)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(row["case"])
        for key, value in row.items():
            if key != "case":
                print(f"    {key:30} {value}")
    print(f"written to {path}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
