"""Results of the transfer benchmark as a picture: speed over chunk size, ours beside what ran in the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pd_connector.figure import load_pyplot, save_figure

SERIES = ("t1", "t2", "nt1", "nt2", "lanes", "iperf3", "nixl_default", "nixl_tuned", "mooncake_default")
"""In a fixed order, so that each has its colour in every panel."""
MEMORY = ("t1", "t2", "nt1", "nt2")
SIZES = {8192: "8K", 32768: "32K", 65536: "64K", 262144: "256K", 1 << 20: "1M"}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per transport, scope and kind of memory. Raises ConfigError for a file that cannot be written."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = f"{row['transport']}, {row['scope']}, {row['memory']}, {row['pages']} pages, {row['threads']} threads"
        panels.setdefault(title + (", pinned" if row["pin"] else ""), []).append(row)
    figure, axes = load_pyplot().subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    for axis, (title, some) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, sorted(some, key=lambda row: int(row["chunk_bytes"])))
        axis.set_title(title, fontsize=9)
    axes[0][0].set_ylabel("GB/s (median; bar: min to max)")
    save_figure(figure, path)


def _panel(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    sizes = [SIZES.get(row["chunk_bytes"], str(row["chunk_bytes"])) for row in rows]
    speed = [row["gbps_median"] for row in rows]
    low = [row["gbps_median"] - row["gbps_min"] for row in rows]
    high = [row["gbps_max"] - row["gbps_median"] for row in rows]
    axis.errorbar(sizes, speed, yerr=[low, high], marker="o", linewidth=2, capsize=3, color="C0", label="pd_connector")
    names = {key[6:-5] for row in rows for key in row if key.startswith("limit_")}
    if names - set(MEMORY) and rows[0]["transport"] != "shm":
        names -= set(MEMORY)  # far above whatever a socket does
    for name in sorted(names, key=lambda name: SERIES.index(name) if name in SERIES else len(SERIES)):
        colour = f"C{1 + SERIES.index(name)}" if name in SERIES else "black"
        values = [row.get(f"limit_{name}_gbps") for row in rows]
        axis.plot(sizes, values, marker=".", linestyle="--", linewidth=1, label=name, color=colour)
    axis.set_xlabel("bytes per chunk")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
