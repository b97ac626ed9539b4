"""The evaluation's pictures: accuracy by length, the needle grid, the drift curve, the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.figures import (
    GREY,
    HEAT,
    lengths_along,
    mark_place,
    new_figure,
    new_panels,
    png,
    tidy,
)
from longctx_layers.reports.results import Row
from longctx_layers.reports.words import wrapped

Rows = Sequence[tuple[Checkpoint, Sequence[Row]]]
PER_INCH = 8  # characters of a title
SMALLEST_LABEL = 24  # cells of a heat map in a row, up to which they carry numbers


def draw_lengths(task: str, rows: Rows) -> bytes:
    """Accuracy by length with intervals; dotted with the state zeroed. A PNG."""
    figure, axes = new_figure(f"{task}: accuracy by length", "length (tokens)", "accuracy")
    for one, own in rows:
        x, y = [row["length"] for row in own], [row["accuracy"] for row in own]
        # Not below 0, which rounding may make of an accuracy of 0 or 1.
        bars = [
            [max(0, row["accuracy"] - row["low"]) for row in own],
            [max(0, row["high"] - row["accuracy"]) for row in own],
        ]
        style = {"color": one.colour, "marker": one.mark, "markersize": 6}
        axes.errorbar(x, y, yerr=bars, capsize=3, label=one.label, **style)
        zeroed = [(row["length"], row["accuracy_state_zeroed"]) for row in own]
        zeroed = [(n, value) for n, value in zeroed if value is not None]
        if zeroed:
            label = f"{one.label}, state zeroed"
            axes.plot(*zip(*zeroed, strict=True), ":", fillstyle="none", label=label, **style)
    chances = {round(row["chance"], 6) for _, own in rows for row in own}
    for i, chance in enumerate(sorted(chances)):
        label = None if i else "chance"
        axes.axhline(chance, color=GREY, linestyle="--", linewidth=1, label=label)
    lengths_along(axes)
    axes.set_xticks(sorted({row["length"] for _, own in rows for row in own}))
    axes.set_ylim(-0.03, 1.2)  # above 1, room for a mark's label
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    trained = {one.trained_length for one, _ in rows if one.trained_length}
    shown = axes.get_xlim()
    for length in trained:
        if shown[0] < length < shown[1]:
            mark_place(axes, length, "training\nlength")
    return png(figure, axes, columns=2)


def draw_needle(depths: Rows) -> bytes:
    """Accuracy by depth and length, a panel for each checkpoint, as a PNG."""
    lengths = sorted({row["length"] for _, own in depths for row in own})
    places = sorted({row["depth"] for _, own in depths for row in own})
    width = max(4.2, 0.62 * len(lengths) + 1.6)
    height = max(3.4, 0.45 * len(places) + 1.6)
    figure, panels = new_panels(len(depths), (width, height))
    for axes, (one, own) in zip(panels, depths, strict=True):
        values = {(row["depth"], row["length"]): row["accuracy"] for row in own}
        grid = [[values.get((place, n), float("nan")) for n in lengths] for place in places]
        image = axes.imshow(grid, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, ha="right")
        axes.set_yticks(range(len(places)), [f"{100 * place:.0f} %" for place in places])
        title = wrapped(one.label, int(PER_INCH * width))
        axes.set(title=title, xlabel="length (tokens)", ylabel="depth (0 %: at the beginning)")
        if len(lengths) <= SMALLEST_LABEL:
            _label_cells(axes, grid)
    figure.suptitle("Needle: accuracy by depth and length")
    scale = f"accuracy (chance {_chance(depths)})"
    figure.colorbar(image, ax=list(panels), label=scale, fraction=0.05, pad=0.02)
    return png(figure)


def _label_cells(axes: Any, grid: Sequence[Sequence[float]]) -> None:
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            text = "-" if value != value else f"{value:.2f}"
            # The palette is light at its upper end.
            colour = "black" if value > 0.43 or value != value else "white"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)


def _chance(rows: Rows) -> str:
    return " or ".join(sorted({f"{row['chance']:.3f}" for _, own in rows for row in own}))


def draw_drift(places: Rows) -> bytes:
    """Accuracy and loss by the place of the question, in the longest sequences, as a PNG."""
    figure, (left, right) = new_panels(2)
    tidy(left, "Drift curve: accuracy", "place of the question (tokens)", "accuracy")
    tidy(right, "Drift curve: loss", "place of the question (tokens)", "loss of the answer (nats)")
    for one, own in places:
        longest = max(row["length"] for row in own)
        kept = [row for row in own if row["length"] == longest]
        x = [max(1, row["place"]) for row in kept]
        style = {"color": one.colour, "marker": one.mark, "markersize": 5}
        label = f"{one.label}, {longest:,} tokens"
        left.plot(x, [row["accuracy"] for row in kept], label=label, **style)
        right.plot(x, [row["loss"] for row in kept], label=label, **style)
    left.set_ylim(-0.03, 1.05)
    highest = max(row["loss"] for _, own in places for row in own)
    right.set_ylim(-0.03 * highest, 1.08 * highest)
    for axes in (left, right):
        lengths_along(axes)
    return png(figure, below=left.get_legend_handles_labels(), columns=2)


def draw_stream(places: Rows, differ: bool = False) -> bytes:
    """Loss by position in a stream, means over its parts, as a PNG.

    Args:
        differ: whether the tokenizers do, so that the lines are not comparable.
    """
    unit = "loss (nats per token)"
    if differ:
        unit += "\nnot comparable: the tokenizers differ"
    figure, axes = new_figure(
        "Streaming: loss by position", "position in the stream (tokens)", unit
    )
    for one, own in places:
        longest = max(row["length"] for row in own)
        kept = [row for row in own if row["length"] == longest]
        axes.plot(
            [row["place"] for row in kept], [row["loss"] for row in kept], color=one.colour,
            marker=one.mark, markersize=4, markevery=max(1, len(kept) // 12), label=one.label,
        )  # fmt: skip
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
    for trained in {one.trained_length for one, _ in places if one.trained_length}:
        mark_place(axes, trained, "training\nlength")
    return png(figure, axes, columns=2)
