"""The evaluation's pictures: accuracy by length, the needle grid, by place, and the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from longctx_layers.evals.program.rows import Row
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
from longctx_layers.reports.words import wrapped

CheckpointRows = Sequence[tuple[Checkpoint, Sequence[Row]]]
PER_INCH = 8  # characters of a title
MOST_LABELLED = 24  # columns of a heat map up to which its cells carry numbers
DARK = 0.43  # values up to which a cell needs white letters


def draw_lengths(task: str, rows: CheckpointRows) -> bytes:
    """Accuracy by length with intervals; dotted with the state cleared. A PNG."""
    figure, axes = new_figure(f"{task}: accuracy by length", "length (tokens)", "accuracy")
    for checkpoint, own in rows:
        # Not below 0, which rounding may produce for an accuracy of 0 or 1.
        bars = [
            [max(0, row["accuracy"] - row["low"]) for row in own],
            [max(0, row["high"] - row["accuracy"]) for row in own],
        ]
        axes.errorbar(
            [row["length"] for row in own],
            [row["accuracy"] for row in own],
            yerr=bars,
            capsize=3,
            label=checkpoint.label,
            **_style(checkpoint),
        )
        zeroed = [(row["length"], row["accuracy_state_zeroed"]) for row in own]
        zeroed = [(length, value) for length, value in zeroed if value is not None]
        if zeroed:
            axes.plot(
                *zip(*zeroed, strict=True),
                ":",
                fillstyle="none",
                label=f"{checkpoint.label}, state zeroed",
                **_style(checkpoint),
            )
    chances = sorted({round(row["chance"], 6) for _, own in rows for row in own})
    for i, chance in enumerate(chances):
        label = None if i else "chance"
        axes.axhline(chance, color=GREY, linestyle="--", linewidth=1, label=label)
    lengths_along(axes)
    axes.set_xticks(sorted({row["length"] for _, own in rows for row in own}))
    axes.set_ylim(-0.03, 1.2)  # room above 1 for the label of a vertical line
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    first, last = axes.get_xlim()
    for length in {c.trained_length for c, _ in rows if c.trained_length}:
        if first < length < last:
            mark_place(axes, length, "training\nlength")
    return png(figure, axes, columns=2)


def _style(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"color": checkpoint.colour, "marker": checkpoint.mark, "markersize": 6}


def draw_needle(depths: CheckpointRows) -> bytes:
    """Accuracy by depth and length, a panel for each checkpoint, as a PNG."""
    lengths = sorted({row["length"] for _, own in depths for row in own})
    places = sorted({row["depth"] for _, own in depths for row in own})
    width = max(4.2, 0.62 * len(lengths) + 1.6)
    height = max(3.4, 0.45 * len(places) + 1.6)
    figure, panels = new_panels(len(depths), (width, height))
    for axes, (checkpoint, own) in zip(panels, depths, strict=True):
        values = {(row["depth"], row["length"]): row["accuracy"] for row in own}
        grid = [[values.get((place, n), float("nan")) for n in lengths] for place in places]
        image = axes.imshow(grid, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, ha="right")
        axes.set_yticks(range(len(places)), [f"{100 * place:.0f} %" for place in places])
        title = wrapped(checkpoint.label, int(PER_INCH * width))
        axes.set(title=title, xlabel="length (tokens)", ylabel="depth (0 %: at the beginning)")
        if len(lengths) <= MOST_LABELLED:
            _label_cells(axes, grid)
    figure.suptitle("Needle: accuracy by depth and length")
    chances = sorted({f"{row['chance']:.3f}" for _, own in depths for row in own})
    scale = f"accuracy (chance {' or '.join(chances)})"
    figure.colorbar(image, ax=panels, label=scale, fraction=0.05, pad=0.02)
    return png(figure)


def _label_cells(axes: Axes, grid: Sequence[Sequence[float]]) -> None:
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            missing = value != value
            text = "-" if missing else f"{value:.2f}"
            colour = "black" if missing or value > DARK else "white"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)


def draw_places(name: str, places: CheckpointRows) -> bytes:
    """Accuracy and loss by the position of the question, in the longest sequences, as a PNG."""
    figure, (left, right) = new_panels(2)
    tidy(left, f"{name}: accuracy", "position of the question (tokens)", "accuracy")
    tidy(right, f"{name}: loss", "position of the question (tokens)", "loss of the answer (nats)")
    for checkpoint, own in places:
        longest = max(row["length"] for row in own)
        rows = [row for row in own if row["length"] == longest]
        x = [max(1, row["place"]) for row in rows]
        style = {**_style(checkpoint), "markersize": 5}
        label = f"{checkpoint.label}, {longest:,} tokens"
        left.plot(x, [row["accuracy"] for row in rows], label=label, **style)
        right.plot(x, [row["loss"] for row in rows], label=label, **style)
    left.set_ylim(-0.03, 1.05)
    highest = max(row["loss"] for _, own in places for row in own)
    right.set_ylim(-0.03 * highest, 1.08 * highest)
    for axes in (left, right):
        lengths_along(axes)
    return png(figure, below=left.get_legend_handles_labels(), columns=2)


def draw_stream(places: CheckpointRows, differ: bool = False) -> bytes:
    """Loss by position in a stream, means over its parts, as a PNG.

    Args:
        places: rows by place.
        differ: whether the tokenizers differ, so that the lines are not comparable.
    """
    unit = "loss (nats per token)"
    if differ:
        unit += "\nnot comparable: the tokenizers differ"
    figure, axes = new_figure(
        "Streaming: loss by position", "position in the stream (tokens)", unit
    )
    for checkpoint, own in places:
        longest = max(row["length"] for row in own)
        rows = [row for row in own if row["length"] == longest]
        axes.plot(
            [row["place"] for row in rows],
            [row["loss"] for row in rows],
            color=checkpoint.colour,
            marker=checkpoint.mark,
            markersize=4,
            markevery=max(1, len(rows) // 12),
            label=checkpoint.label,
        )
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
    for length in {c.trained_length for c, _ in places if c.trained_length}:
        mark_place(axes, length, "training\nlength")
    return png(figure, axes, columns=2)
