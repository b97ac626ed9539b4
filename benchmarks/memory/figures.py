"""The pictures of docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.memory.plan import BLOCKS
from longctx_layers.reports.figures import (
    GREY,
    lengths_along,
    mark_place,
    new_figure,
    png,
    style_of,
)

NAMES = tuple(BLOCKS)
_OFF = ", state path off"
ByBlock = Mapping[str, Sequence[Mapping[str, Any]]]  # results by block, one for each seed


def style(name: str) -> tuple[str, str, str, str]:
    """Colour, marker, line and label of a block; dotted without its state path."""
    colour, mark, label = style_of(name.removesuffix(_OFF))
    return colour, mark, ":" if name.endswith(_OFF) else "-", label + _OFF * name.endswith(_OFF)


def label(name: str) -> str:
    """The name of a block on the page."""
    return style(name)[3]


def by_length(found: ByBlock, trained: int, farthest: int) -> bytes:
    """Accuracy by length: medians as lines, seeds as dots. A PNG."""
    figure, axes = new_figure(
        "Passkey: accuracy by length", "length of the sequence (tokens)", "accuracy"
    )
    for name, seeds in found.items():
        colour, mark, line, text = style(name)
        points: dict[int, list[float]] = {}
        for result in seeds:
            for row in result["rows"]:
                points.setdefault(row["length"], []).append(row["accuracy"])
        lengths = sorted(points)
        middle = [statistics.median(points[length]) for length in lengths]
        axes.plot(lengths, middle, line, color=colour, marker=mark, markersize=5, label=text)
        for length in lengths:
            seeds_there = points[length]
            x = [length] * len(seeds_there)
            axes.plot(x, seeds_there, ".", color=colour, alpha=0.6, markersize=4)
    lengths_along(axes)
    axes.set_ylim(-0.03, 1.12)
    axes.axhline(1 / 32, color=GREY, linestyle="--", linewidth=1)
    axes.text(farthest, 1 / 32, "chance", color=GREY, fontsize=8, ha="right", va="bottom")
    mark_place(axes, trained, "training\nlength")
    axes.set_xlim(trained / 1.3, farthest * 1.3)
    return png(figure, axes)


def by_state(found: ByBlock, length: int, pairs: Sequence[int]) -> bytes:
    """Accuracy against bytes of state, with the number of pairs at each point, as a PNG."""
    figure, axes = new_figure(
        f"Associative recall in {length} tokens: accuracy by bytes of state",
        f"state after {length} tokens (bytes); at the points: pairs of key and value",
        "accuracy (median of the seeds)",
    )
    for name, seeds in found.items():
        colour, mark, _, text = style(name)
        places: list[float] = []
        middles: list[float] = []
        for count in pairs:
            rows = [
                row
                for result in seeds
                for row in result["rows"]
                if row["length"] == length and row["pairs"] == count
            ]
            places.append(rows[0]["state_bytes"])
            middles.append(statistics.median(row["accuracy"] for row in rows))
        axes.plot(places, middles, color=colour, marker=mark, markersize=6, label=text, alpha=0.8)
        # Points on top of each other share one annotation.
        together: list[tuple[float, list[int]]] = []
        for middle, count in zip(middles, pairs, strict=True):
            if together and abs(together[-1][0] - middle) < 0.04:
                together[-1][1].append(count)
            else:
                together.append((middle, [count]))
        for middle, counts in together:
            axes.annotate(
                ", ".join(map(str, counts)),
                (places[0], middle),
                xytext=(8, -3),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
            )
    lengths_along(axes)
    axes.margins(x=0.15)
    axes.set_ylim(-0.05, 1.05)
    return png(figure, axes)


def by_position(found: ByBlock) -> bytes:
    """Loss by position in the stream, a point for each pass over the whole text, as a PNG."""
    figure, axes = new_figure(
        "Loss over a stream of held-out text",
        "position in the stream (bytes)",
        "loss (nats per byte)",
    )
    for name, seeds in found.items():
        colour, mark, line, text = style(name)
        for i, result in enumerate(seeds):
            losses = result["by_position"]
            part = result["part"]
            size = len(losses) // result["rotations"]
            groups = [losses[k : k + size] for k in range(0, len(losses), size)]
            places = [(size * k + len(g) / 2) * part for k, g in enumerate(groups)]
            axes.plot(
                places,
                [statistics.mean(g) for g in groups],
                line,
                color=colour,
                marker=mark,
                markersize=5,
                label=None if i else text,
                alpha=0.5 if i else 1.0,
            )
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
    return png(figure, axes)
