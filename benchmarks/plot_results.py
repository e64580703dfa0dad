"""Draw results/transport.jsonl into results/transport.png: the newest row of every case that is there.

python benchmarks/plot_results.py
"""

from __future__ import annotations

import json
from typing import Any

import machine

from pd_connector.bench.plot import plot

CASE = ("transport", "scope", "memory", "pages", "threads", "pin")
MOST_PANELS = (
    ("shm", "host", "owned", "4K", 2, False),
    ("shm", "host", "foreign", "4K", 2, False),
    ("shm", "host", "foreign", "huge", 2, False),
    ("tcp", "veth", "owned", "4K", 2, False),
)


def newest() -> list[dict[str, Any]]:
    """Rows of the panels, later lines replacing earlier ones; what ran beside only once stays in the picture."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (machine.RESULTS / "transport.jsonl").read_text().splitlines():
        row = json.loads(line)
        case = tuple(row.get(name) for name in CASE)
        if case in MOST_PANELS:
            key = (*case, row["chunk_bytes"])
            found[key] = {**found.get(key, {}), **row}
    return [row for key, row in sorted(found.items(), key=lambda item: MOST_PANELS.index(item[0][:-1]))]


if __name__ == "__main__":
    path = machine.RESULTS / "transport.png"
    plot(newest(), path)
    print(f"written to {path}")
