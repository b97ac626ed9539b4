"""What the example programs' pictures share: colours, marks, axes, and how they become PNGs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from longctx_layers.layers import LAYERS

matplotlib.rcParams["text.parse_math"] = False  # a $ in a file's name is a $

# Okabe and Ito's palette, with a mark for each colour, so that lines also differ in grey. In the
# order in which lines are best told apart.
SERIES = [
    ("#0072B2", "o"),
    ("#D55E00", "X"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#000000", "s"),
    ("#56B4E9", "P"),
]
GREY = "#555555"
HEAT = "viridis"


def style_of(block: str) -> tuple[str, str, str]:
    """Colour, mark and label of a layer by its name in `LAYERS`: its own, or the next free ones."""
    layer = LAYERS[block]
    if layer.style is not None:
        return *layer.style, layer.label or block
    taken = [other.style for other in LAYERS.values() if other.style is not None]
    free = [style for style in SERIES if style not in taken] or SERIES
    unstyled = [name for name, other in LAYERS.items() if other.style is None]
    return *free[unstyled.index(block) % len(free)], layer.label or block


def new_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """A figure with one pair of axes; away from pyplot, nothing of it is global."""
    figure = Figure(figsize=(7.5, 4.5))
    return figure, tidy(figure.subplots(), title, xlabel, ylabel)


def new_panels(count: int, size: tuple[float, float] = (5.0, 4.2)) -> tuple[Figure, Sequence[Any]]:
    """A figure with panels, up to three side by side, each of a size in inches."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def tidy(axes: Any, title: str, xlabel: str, ylabel: str) -> Any:
    """Name the axes, with a faint grid and no frame."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def lengths_along(axes: Any) -> None:
    """Lengths or positions along the x axis: doubling ticks, written out."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")


def in_decades(axes: Any) -> None:
    """The y axis logarithmic, once all is drawn, over a factor of 4 at least."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        low, high = low / 2, high * 2
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_steps(axes: Any) -> None:
    """The x axis in whole numbers: of steps, or of layers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def mark_place(axes: Any, place: float, label: str) -> None:
    """A dotted vertical line, with its label at the top."""
    axes.axvline(place, color=GREY, linestyle=":", linewidth=1)
    axes.text(
        place, 0.98, f" {label}".replace("\n", "\n "), transform=axes.get_xaxis_transform(),
        va="top", fontsize=8, color=GREY,
    )  # fmt: skip


def without_the_fall(axes: Any, losses: Sequence[float]) -> None:
    """Leave out of view the first steps, whose fall would press the rest together."""
    if len(losses) >= 20:
        axes.set_ylim(min(losses) - 0.05, sorted(losses)[int(0.95 * len(losses))] + 0.05)


def png(figure: Figure, legend_of: Any = None, *, below: Any = None, columns: int = 3) -> bytes:
    """The finished picture, with the legend of these axes below them.

    Args:
        below: handles and labels of a legend below all panels instead.
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
