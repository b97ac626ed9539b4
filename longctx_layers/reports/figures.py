"""What all pictures share: the palette, markers, axes, and how figures become PNGs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from longctx_layers.layers import LAYERS

matplotlib.rcParams["text.parse_math"] = False  # a $ in a file's name is a $

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
PALETTE = (BLACK, ORANGE, SKY_BLUE, GREEN, YELLOW, BLUE, VERMILION, PURPLE)
GREY = "#555555"  # for lines and words that are no data
HEAT = "viridis"

# For lines that stand for no block, the most distinguishable first.
SERIES = (
    (BLUE, "o"),
    (VERMILION, "X"),
    (GREEN, "^"),
    (PURPLE, "D"),
    (ORANGE, "v"),
    (BLACK, "s"),
    (SKY_BLUE, "P"),
)


def style_of(block: str) -> tuple[str, str, str]:
    """Colour, mark and label of a layer by its name in `LAYERS`: its own, or the next free ones."""
    layer = LAYERS[block]
    if layer.style is not None:
        return *layer.style, layer.label or block
    taken = [other.style for other in LAYERS.values() if other.style is not None]
    free = [style for style in SERIES if style not in taken] or SERIES
    unstyled = [name for name, other in LAYERS.items() if other.style is None]
    return *free[unstyled.index(block) % len(free)], layer.label or block


class Line(NamedTuple):
    """A line of a picture: its points, and what it looks like."""

    x: Sequence[float]
    y: Sequence[float]
    label: str
    colour: str
    mark: str = ""
    style: str = "-"


AxesT = TypeVar("AxesT", bound=Axes)
Legend = tuple[Sequence[Artist], Sequence[str]]  # handles and labels


def new_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes. It does not use pyplot, which has global state."""
    figure = Figure(figsize=(7.5, 4.5))
    return figure, tidy(figure.subplots(), title, xlabel, ylabel)


def new_panels(count: int, size: tuple[float, float] = (5.0, 4.2)) -> tuple[Figure, list[Axes]]:
    """A figure with panels, up to three in a row, each of a size in inches."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def tidy(axes: AxesT, title: str, xlabel: str, ylabel: str) -> AxesT:
    """Label the axes; a faint grid and no frame."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def lengths_along(axes: Axes) -> None:
    """Lengths or positions along the x axis: ticks at powers of two, written in full."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")


def in_decades(axes: Axes) -> None:
    """Make the y axis logarithmic, over a factor of 4 at least; call it after drawing."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        low /= 2
        high *= 2
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_steps(axes: Axes) -> None:
    """Whole numbers along the x axis: of steps or of layers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def mark_place(axes: Axes, place: float, label: str) -> None:
    """A dotted vertical line with its label at the top."""
    axes.axvline(place, color=GREY, linestyle=":", linewidth=1)
    axes.text(
        place,
        0.98,
        f" {label}".replace("\n", "\n "),
        transform=axes.get_xaxis_transform(),
        va="top",
        fontsize=8,
        color=GREY,
    )


def without_the_fall(axes: Axes, losses: Sequence[float]) -> None:
    """Choose the y range such that the steep fall of the first steps is out of view."""
    if len(losses) >= 20:
        axes.set_ylim(min(losses) - 0.05, sorted(losses)[int(0.95 * len(losses))] + 0.05)


def png(
    figure: Figure,
    legend_of: Axes | None = None,
    *,
    below: Legend | None = None,
    columns: int = 3,
) -> bytes:
    """The finished picture.

    Args:
        figure: to render.
        legend_of: axes that get a legend below them.
        below: handles and labels of a legend below all panels.
        columns: of the legend.
    """
    if below is not None:
        figure.legend(*below, frameon=False, loc="outside lower center", ncols=columns)
    if legend_of is not None:
        legend_of.legend(
            frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def draw_lines(axes: Axes, lines: Sequence[Line], *, most_marks: int = 12) -> None:
    """Draw lines; long ones get a marker at some points only."""
    for line in lines:
        axes.plot(
            line.x,
            line.y,
            line.style,
            color=line.colour,
            marker=line.mark,
            markersize=5,
            markevery=max(1, len(line.x) // most_marks),
            label=line.label,
        )


def position_line(
    rows: Sequence[tuple[int, int, float]], label: str, colour: str, mark: str, style: str = "-"
) -> Line:
    """The line of losses by position, from rows of `longctx_layers.evals.buckets`."""
    places = [math.sqrt(first * last) for first, last, _ in rows]
    return Line(places, [mean for *_, mean in rows], label, colour, mark, style)


def draw_positions(
    title: str,
    unit: str,
    lines: Sequence[Line],
    marked: Mapping[str, float],
    *,
    columns: int = 3,
) -> bytes:
    """Losses by position as a PNG.

    Args:
        title: of the picture.
        unit: of the positions.
        lines: from `position_line`.
        marked: positions to mark with a vertical line, by label.
        columns: of the legend.
    """
    figure, axes = new_figure(
        title, f"position in the sequence ({unit}s)", f"validation loss (nats per {unit})"
    )
    draw_lines(axes, lines)
    lengths_along(axes)
    for label, place in marked.items():
        mark_place(axes, place, label)
    return png(figure, axes, columns=columns)
