"""Log-log plots of time and memory against length, with the slopes."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from benchmarks.speed.common import RUNS
from benchmarks.speed.measuring import slope
from longctx_layers import LAYERS
from longctx_layers.reports.figures import (
    SERIES,
    in_decades,
    lengths_along,
    new_panels,
    png,
    style_of,
    tidy,
)

OTHER_LINES = ("--", ":")


class Axis(NamedTuple):
    """What the y axis shows: a field of the rows, the unit that it is divided by, its label."""

    key: str
    unit: float
    label: str


class LineStyle(TypedDict):
    """How a line is drawn: arguments of matplotlib's `plot`."""

    linestyle: str
    color: str
    marker: str


AXES = {
    "time": Axis("median", 1.0, "seconds"),
    "memory": Axis("peak_bytes", 2.0**20, "peak memory (MiB)"),
}


def line_styles(names: list[str]) -> dict[str, LineStyle]:
    """Line, colour and marker by name: layers have those of all figures and solid lines."""
    others = [name for name in names if name not in LAYERS]
    styles: dict[str, LineStyle] = {}
    for name in names:
        if name in LAYERS:
            colour, marker, _ = style_of(name)
            line = "-"
        else:
            repeat, place = divmod(others.index(name), len(SERIES))
            colour, marker = SERIES[place]
            line = OTHER_LINES[repeat % len(OTHER_LINES)]
        styles[name] = {"linestyle": line, "color": colour, "marker": marker}
    return styles


def draw(rows: list[dict[str, Any]], what: str) -> bytes:
    """A PNG with a panel for each run and a line for each name.

    Args:
        rows: with `name`, `run`, `length`, and `median` or `peak_bytes`.
        what: `"time"` or `"memory"`.
    """
    axis = AXES[what]
    drawn = [row for row in rows if row["run"] in RUNS and row.get(axis.key)]
    styles = line_styles(list(dict.fromkeys(row["name"] for row in drawn)))
    figure, panels = new_panels(len(RUNS), size=(6.2, 5.2))
    figure.set_layout_engine(None)  # the legends below would take the room of the panels
    for panel, run in zip(panels, RUNS, strict=True):
        panel.sharey(panels[0])
        tidy(panel, run, "length (tokens)", axis.label)
        for name, style in styles.items():
            points = [row for row in drawn if (row["run"], row["name"]) == (run, name)]
            if not points:
                continue
            x = [row["length"] for row in points]
            y = [row[axis.key] / axis.unit for row in points]
            exponent = f"  (slope {slope(x, y):.2f})" if len(x) > 1 else ""
            panel.plot(x, y, markersize=4, label=name + exponent, **style)
        lengths_along(panel)
        panel.set_xticks(sorted({row["length"] for row in drawn}))
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14))
    in_decades(panels[0])
    return png(figure)
