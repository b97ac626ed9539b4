"""The evaluation tables: every task by length, with its interval, chance, and the state zeroed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from longctx_layers.evals import effective_length
from longctx_layers.evals.program.options import NEEDLE, STREAMING
from longctx_layers.evals.program.table import THRESHOLD
from longctx_layers.reports.checkpoint import Checkpoint, tokenizers_differ
from longctx_layers.reports.content import Part, Picture, Section, Table, Warned
from longctx_layers.reports.results import SLOPES, Results, Row
from longctx_layers.reports.sections import evaluation_pictures as pictures

OVER_PARTS = "95 % interval over parts of the text"
TOKENIZERS_DIFFER = (
    "The checkpoints have different tokenizers: their losses per token, perplexities and "
    f"accuracies in {STREAMING} are not comparable. Only the bits per byte under Loss by position "
    "can be compared."
)

Known = Sequence[tuple[Checkpoint, Results]]
Rows = Sequence[tuple[Checkpoint, Sequence[Row]]]


def section(checkpoints: Sequence[Checkpoint], results: Sequence[Results | None]) -> Section:
    """What is known of how well the checkpoints remember."""
    known = [(c, r) for c, r in zip(checkpoints, results, strict=True) if r is not None]
    missing = [c for c, r in zip(checkpoints, results, strict=True) if r is None]
    parts: list[Part] = [
        f"No evaluation of {one.label} was found: run examples/evaluate.py --task TASK "
        f"--checkpoint_path {one.path}, and then this report again."
        for one in missing
    ]
    tasks = dict.fromkeys(task for _, r in known for task in r.by_length)
    if known:
        folders = ", ".join(dict.fromkeys(str(r.folder) for _, r in known))
        parts.append(
            f"Measured by examples/evaluate.py, read from {folders}. {_intervals(tasks)} "
            "Zeroed is the accuracy with the recurrent state emptied before the question: "
            "what is left of the accuracy there is not the memory's doing. The reach is how many "
            "tokens back the stacked windows see."
        )
    for task in tasks:
        rows = [(c, r.by_length[task]) for c, r in known if task in r.by_length]
        parts += _of_task(task, rows, known)
    numbers = {c.label: {**r.by_length, "depths": r.by_depth} for c, r in known}
    return Section("Evaluation", parts, numbers)


def _intervals(tasks: Collection[str]) -> str:
    """What the intervals of these tasks are."""
    said = []
    if set(tasks) - {STREAMING}:
        said.append("Intervals are Wilson's of 95 %.")
    if STREAMING in tasks:
        said.append(f"That of {STREAMING} is a {OVER_PARTS}.")
    return " ".join(said)


def _of_task(task: str, rows: Rows, known: Known) -> list[Part]:
    parts: list[Part] = [_table(task, rows)]
    verdicts = [said for c, own in rows for said in _verdict(task, c, own)]
    if task == STREAMING:
        places = [(c, r.by_place[task]) for c, r in known if r.by_place.get(task)]
        differ = tokenizers_differ([one for one, _ in rows])
        if differ:
            parts.append(Warned(TOKENIZERS_DIFFER))
        shown = "Loss by position of a long stream of text"
        parts.append(Picture(task, shown, pictures.draw_stream(places, differ)))
        return [*parts, *(_drift(c, own[-1]) for c, own in rows), *verdicts]
    shown = f"{task}: accuracy by length"
    parts.append(Picture(task, shown, pictures.draw_lengths(task, rows)))
    if task == NEEDLE:
        depths = [(c, r.by_depth) for c, r in known if r.by_depth]
        shown = "Needle: accuracy by depth and length"
        parts.append(Picture("needle_depths", shown, pictures.draw_needle(depths)))
    if task == "drift_curve":
        places = [(c, r.by_place[task]) for c, r in known if r.by_place.get(task)]
        shown = "Drift curve: accuracy and loss by the distance of the question"
        parts.append(Picture("drift_curve_places", shown, pictures.draw_drift(places)))
    return [*parts, *verdicts]


def _table(task: str, rows: Rows) -> Table:
    lengths = sorted({row["length"] for _, own in rows for row in own})
    cells = [
        [
            f"{length:,}",
            one.label,
            f"{row['accuracy']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['chance']:.3f}",
            _or_dash(row["accuracy_state_zeroed"], "{:.3f}"),
            _or_dash(row.get("loss"), "{:.3f}"),
            f"{row['n']:,}",
            _or_dash(row["reach"], "{:,}"),
        ]
        for length in lengths
        for one, own in rows
        for row in own
        if row["length"] == length
    ]
    n, interval = ("tokens", OVER_PARTS) if task == STREAMING else ("sequences", "95 % interval")
    header = [
        f"{task}, length (tokens)", "checkpoint", "accuracy", interval, "chance", "zeroed",
        "loss (nats)", n, "reach",
    ]  # fmt: skip
    return Table(header, cells)


def _verdict(task: str, one: Checkpoint, rows: Sequence[Row]) -> list[Part]:
    """What the rows amount to, and loudly where they are no result."""
    if not all(row.get("trained", True) for row in rows):
        return [Warned(f"{one.label} was not trained: its scores in {task} are chance.")]
    if all(row["low"] <= row["chance"] for row in rows):
        return [
            Warned(f"{one.label} is at chance in {task} at every length: it has not learnt it.")
        ]
    if task == STREAMING:  # nobody foresees text that well
        return []
    found = effective_length({row["length"]: row["accuracy"] for row in rows}, THRESHOLD)
    length = "none" if found is None else f"{found:,} tokens"
    return [f"{one.label}, effective length in {task} (accuracy at least {THRESHOLD}): {length}."]


def _drift(one: Checkpoint, row: Row) -> str:
    slope, low, high = (row.get(name, math.nan) for name in SLOPES)
    if all(value is not None and math.isfinite(value) for value in (slope, low, high)):
        trend = "rises" if low > 0 else "falls" if high < 0 else "neither rises nor falls"
        said = (
            f"the loss {trend} with the position: {slope:+.5f} nats per 1,000 tokens ({low:+.5f} "
            f"to {high:+.5f}), each part of the text compared with itself at other positions"
        )
    else:
        said = "the text is too short for a slope of the loss"
    return (
        f"{one.label}: behind {row['slope_from']:,} tokens {said}; perplexity "
        f"{row['perplexity']:.3f} in the second half of {row['length']:,} tokens."
        + ("" if row.get("held_out") else " Whether it was trained on this text is not known.")
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
