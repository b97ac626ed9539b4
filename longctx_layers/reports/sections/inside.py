"""What the layers do with their memory: the weight of its path, and how long it lasts."""

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
from longctx_layers.reports.words import wrapped
from longctx_layers.training.inspection import memory_statistics

TOKENS, ROWS = 512, 4

GATE, SCALE, LONGEST = "gate/layer_", "time_scale/layer_", "longest_time_scale/layer_"
Layers = dict[str, dict[int, float]]  # by the names above, by layer


class Seen(NamedTuple):
    """A checkpoint with what its layers did, and with what they were looked at."""

    checkpoint: Checkpoint
    layers: Layers
    inputs: str


def measure(checkpoint: Checkpoint, text: Text | None) -> Seen | None:
    """None for a model without a second path, and where there is nothing to look at it with."""
    found = _inputs(checkpoint, text)
    if found is None:
        return None
    ids, inputs = found
    ids = ids.to(checkpoint.model.embedding.weight.device)
    values = memory_statistics(checkpoint.model, ids, None)
    layers = by_layer({name: value.item() for name, value in values.items()})
    return Seen(checkpoint, layers, inputs) if any(layers.values()) else None


def _inputs(checkpoint: Checkpoint, text: Text | None) -> tuple[Tensor, str] | None:
    if checkpoint.tokenizer is not None and text is not None:
        try:
            ids = encoded(text.documents, checkpoint.tokenizer, TOKENS, ROWS)
        except ValueError:  # too short; the section on the loss says so
            return None
        return ids[:, :-1], "held-out text"
    if checkpoint.tokenizer is None and checkpoint.model.config.vocab_size >= SYNTHETIC.size:
        drawn = Passkey().draw(ROWS, TOKENS, torch.Generator().manual_seed(0))
        return drawn.ids, "the sequences of the task passkey"
    return None


def by_layer(values: Mapping[str, Any]) -> Layers:
    """Values by name and layer, of those that are of a layer."""
    return {
        name: {int(k[len(name) :]): v for k, v in values.items() if k.startswith(name)}
        for name in (GATE, SCALE, LONGEST)
    }


def section(
    checkpoints: Sequence[Checkpoint], logs: Sequence[Log | None], text: Text | None
) -> Section | None:
    """Pictures and a table; None if no layer has a second path."""
    shown = [seen for one in checkpoints if (seen := measure(one, text)) is not None]
    if not shown:
        return None
    inputs = " and ".join(dict.fromkeys(seen.inputs for seen in shown))
    parts: list[Part] = [
        "The gate is the mean weight of the attention's path beside the state's, 0.5 at the "
        "beginning of training and 1 if the state is not used. The time scale is the number of "
        "tokens after which a state has decayed to 1/e, for the input's own decays where they "
        f"depend on it. Measured on {inputs}.",
        Picture("gates_and_time_scales", "Gate and time scale by layer", draw_layers(shown)),
    ]
    for i, (one, log) in enumerate(zip(checkpoints, logs, strict=True)):
        courses = by_layer({} if log is None else {n: log.curve(n) for n in log.scalars})
        if len(next(iter(courses[GATE].values()), ())) > 1:
            what = f"Gate and time scale in the course of training, {one.label}"
            parts.append(Picture(f"gates_by_step_{i + 1}", what, draw_courses(courses, one.label)))
    for one, layers, _ in shown:
        numbers = sorted({n for values in layers.values() for n in values})
        rows = [
            [
                f"{one.label}, layer {n}",
                _or_dash(layers[GATE].get(n), "{:.3f}"),
                _or_dash(layers[SCALE].get(n), "{:,.0f}"),
                _or_dash(layers[LONGEST].get(n), "{:,.0f}"),
            ]
            for n in numbers
        ]
        header = ["layer", "gate", "time scale (tokens, geometric mean)", "of the slowest head"]
        parts.append(Table(header, rows))
    return Section("Gates and time scales", parts, {s.checkpoint.label: s.layers for s in shown})


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw_layers(shown: Sequence[Seen]) -> bytes:
    """Gates and time scales by layer, as a PNG."""
    figure, (left, right) = new_panels(2)
    tidy(left, "Weight of the attention's path", "layer", "gate (mean over tokens and channels)")
    tidy(right, "How long the state lasts", "layer", "time scale (tokens)")
    for one, layers, _ in shown:
        style = {"color": one.colour, "marker": one.mark, "markersize": 6}
        left.plot(*_xy(layers[GATE]), label=one.label, **style)
        right.plot(*_xy(layers[SCALE]), label=f"{one.label}, mean of the heads", **style)
        style |= {"linestyle": ":", "fillstyle": "none"}
        right.plot(*_xy(layers[LONGEST]), label=f"{one.label}, slowest head", **style)
    left.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    left.set_ylim(0, 1)
    in_decades(right)
    for axes in (left, right):
        whole_steps(axes)
    return png(figure, below=right.get_legend_handles_labels(), columns=2)


def _xy(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    layers = sorted(values)
    return layers, [values[n] for n in layers]


def draw_courses(courses: Mapping[str, Mapping[int, Any]], label: str) -> bytes:
    """The same by training step, a colour for each layer from the first to the last, as a PNG."""
    figure, (left, right) = new_panels(2)
    figure.suptitle(wrapped(label, 80))  # a path has no room above one panel
    tidy(left, "Gate by step", "training step", "gate")
    tidy(right, "Time scale by step", "training step", "time scale (tokens, mean)")
    count = 1 + max(courses[GATE])
    for axes, name in ((left, GATE), (right, SCALE)):
        for n, curve in courses[name].items():
            # Not to the palette's end, which is too light for a line on white.
            colour = colormaps[HEAT](0.85 * n / max(1, count - 1))
            axes.plot(*zip(*curve, strict=True), color=colour, label=f"layer {n}")
    left.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    in_decades(right)
    for axes in (left, right):
        whole_steps(axes)
    handles, names = left.get_legend_handles_labels()
    every = max(1, -(-count // 8))  # of a deep model, the first and some further ones
    return png(figure, below=(handles[::every], names[::every]), columns=8)
