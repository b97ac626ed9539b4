"""What the layers do with their state: the weight of its path, and how long it lasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from torch import Tensor

from longctx_layers.evals import SYNTHETIC, Passkey
from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.content import Part, Picture, Section, Table
from longctx_layers.reports.figures import (
    GREY,
    HEAT,
    in_decades,
    new_panels,
    png,
    tidy,
    whole_steps,
)
from longctx_layers.reports.logs import Log
from longctx_layers.reports.text import Text, encoded
from longctx_layers.reports.words import or_dash, wrapped
from longctx_layers.training.inspection import memory_statistics

TOKENS = 512
ROWS = 4

GATE = "gate/layer_"
SCALE = "time_scale/layer_"
LONGEST = "longest_time_scale/layer_"
Values = dict[str, dict[int, float]]  # by the names above, then by layer
Curves = dict[str, dict[int, list[tuple[int, float]]]]  # the same by training step


class Seen(NamedTuple):
    """What the layers of a checkpoint did, and for which inputs."""

    checkpoint: Checkpoint
    layers: Values
    inputs: str


def measure(checkpoint: Checkpoint, text: Text | None) -> Seen | None:
    """None for a model without a state path, and if there is no suitable input."""
    chosen = _inputs(checkpoint, text)
    if chosen is None:
        return None
    ids, inputs = chosen
    ids = ids.to(checkpoint.model.embedding.weight.device)
    values = memory_statistics(checkpoint.model, ids, None)
    layers: Values = {
        name: {
            int(key.removeprefix(name)): value.item()
            for key, value in values.items()
            if key.startswith(name)
        }
        for name in (GATE, SCALE, LONGEST)
    }
    return Seen(checkpoint, layers, inputs) if any(layers.values()) else None


def _inputs(checkpoint: Checkpoint, text: Text | None) -> tuple[Tensor, str] | None:
    if checkpoint.tokenizer is not None and text is not None:
        try:
            ids = encoded(text.documents, checkpoint.tokenizer, TOKENS, ROWS)
        except ValueError:  # too short, which the section on the loss reports
            return None
        return ids[:, :-1], "held-out text"
    if checkpoint.tokenizer is None and checkpoint.model.config.vocab_size >= SYNTHETIC.size:
        batch = Passkey().draw(ROWS, TOKENS, torch.Generator().manual_seed(0))
        return batch.ids, "sequences of the task passkey"
    return None


def courses(log: Log | None) -> Curves:
    """The logged gates and time scales, by layer and step."""
    names = () if log is None else tuple(log.scalars)
    return {
        prefix: {
            int(name.removeprefix(prefix)): log.curve(name)
            for name in names
            if log is not None and name.startswith(prefix)
        }
        for prefix in (GATE, SCALE, LONGEST)
    }


def section(
    checkpoints: Sequence[Checkpoint], logs: Sequence[Log | None], text: Text | None
) -> Section | None:
    """Pictures and a table; None if no layer has a state path."""
    measured = [seen for c in checkpoints if (seen := measure(c, text)) is not None]
    if not measured:
        return None
    inputs = " and ".join(dict.fromkeys(seen.inputs for seen in measured))
    parts: list[Part] = [
        "The gate is the mean weight of the attention path against the state path: 0.5 at the "
        "beginning of training, and 1 if the state is not used. The time scale is the number of "
        "tokens after which a state has decayed to 1/e; where decays depend on the input, it is "
        f"that of the input's own decays. Measured on {inputs}.",
        Picture("gates_and_time_scales", "Gate and time scale by layer", draw_layers(measured)),
    ]
    for i, (checkpoint, log) in enumerate(zip(checkpoints, logs, strict=True)):
        by_step = courses(log)
        if len(next(iter(by_step[GATE].values()), ())) > 1:
            caption = f"Gate and time scale in the course of training, {checkpoint.label}"
            picture = draw_courses(by_step, checkpoint.label)
            parts.append(Picture(f"gates_by_step_{i + 1}", caption, picture))
    header = ["layer", "gate", "time scale (tokens, geometric mean)", "of the slowest head"]
    for seen in measured:
        numbers = sorted({n for values in seen.layers.values() for n in values})
        rows = [
            [
                f"{seen.checkpoint.label}, layer {n}",
                or_dash(seen.layers[GATE].get(n), "{:.3f}"),
                or_dash(seen.layers[SCALE].get(n), "{:,.0f}"),
                or_dash(seen.layers[LONGEST].get(n), "{:,.0f}"),
            ]
            for n in numbers
        ]
        parts.append(Table(header, rows))
    by_label: dict[str, Any] = {seen.checkpoint.label: seen.layers for seen in measured}
    return Section("Gates and time scales", parts, by_label)


def draw_layers(measured: Sequence[Seen]) -> bytes:
    """Gates and time scales by layer, as a PNG."""
    figure, (left, right) = new_panels(2)
    tidy(left, "Weight of the attention path", "layer", "gate (mean over tokens and channels)")
    tidy(right, "How long the state lasts", "layer", "time scale (tokens)")
    for checkpoint, layers, _ in measured:
        label = checkpoint.label
        style: dict[str, Any] = {
            "color": checkpoint.colour,
            "marker": checkpoint.mark,
            "markersize": 6,
        }
        left.plot(*_xy(layers[GATE]), label=label, **style)
        right.plot(*_xy(layers[SCALE]), label=f"{label}, mean of the heads", **style)
        style |= {"linestyle": ":", "fillstyle": "none"}
        right.plot(*_xy(layers[LONGEST]), label=f"{label}, slowest head", **style)
    left.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    left.set_ylim(0, 1)
    in_decades(right)
    for axes in (left, right):
        whole_steps(axes)
    return png(figure, below=right.get_legend_handles_labels(), columns=2)


def _xy(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    layers = sorted(values)
    return layers, [values[n] for n in layers]


def draw_courses(by_step: Curves, label: str) -> bytes:
    """Gates and time scales by training step, a colour for each layer in order, as a PNG."""
    figure, (left, right) = new_panels(2)
    figure.suptitle(wrapped(label, 80))  # a path does not fit above a single panel
    tidy(left, "Gate by step", "training step", "gate")
    tidy(right, "Time scale by step", "training step", "time scale (tokens, mean)")
    count = 1 + max(by_step[GATE])
    for axes, name in ((left, GATE), (right, SCALE)):
        for n, curve in by_step[name].items():
            # The end of the colour map is too light for a line on white.
            colour = colormaps[HEAT](0.85 * n / max(1, count - 1))
            axes.plot(*zip(*curve, strict=True), color=colour, label=f"layer {n}")
    left.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    in_decades(right)
    for axes in (left, right):
        whole_steps(axes)
    handles, names = left.get_legend_handles_labels()
    every = max(1, -(-count // 8))  # of a deep model, only some layers
    return png(figure, below=(handles[::every], names[::every]), columns=8)
