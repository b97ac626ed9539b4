"""Log-log plots of time and memory against length, with the slopes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.speed.common import RUNS
from benchmarks.speed.measuring import slope
from longctx_layers.files import write
from longctx_layers.reports.figures import PALETTE, png

STYLES = ["-", "--", ":"]
MARKERS = "osD^v<>P"
AXES = {
    "time": ("median", 1.0, "seconds"),
    "memory": ("peak_bytes", 2.0**20, "peak memory (MiB)"),
}


def draw(rows: list[dict[str, Any]], what: str, path: Path) -> None:
    """One panel a run, one line a contender; `what` is `"time"` or `"memory"`."""
    key, unit, label = AXES[what]
    drawn = [row for row in rows if row["run"] in RUNS and row.get(key)]
    names = list(dict.fromkeys(row["name"] for row in drawn))
    figure = Figure(figsize=(6.2 * len(RUNS), 5.2))
    panels = figure.subplots(1, len(RUNS), sharey=True)
    for axes, run in zip(panels, RUNS, strict=True):
        lengths = sorted({row["length"] for row in drawn if row["run"] == run})
        for i, name in enumerate(names):
            own = [row for row in drawn if row["run"] == run and row["name"] == name]
            if not own:
                continue
            x, y = [row["length"] for row in own], [row[key] / unit for row in own]
            exponent = f"  (slope {slope(x, y):.2f})" if len(x) > 1 else ""
            again, colour = divmod(i, len(PALETTE))
            axes.plot(
                x, y, STYLES[again], marker=MARKERS[(i + again) % len(MARKERS)], markersize=4,
                color=PALETTE[colour], label=name + exponent,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.set(xlabel="length (tokens)", title=run)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14))
    panels[0].set_ylabel(label)
    write(path, png(figure))
