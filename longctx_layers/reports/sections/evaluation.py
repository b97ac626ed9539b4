"""The evaluation: every task by length, with interval, chance, and the score without the state."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from longctx_layers.evals import TASKS, effective_length
from longctx_layers.evals.program.rows import Row
from longctx_layers.evals.program.table import THRESHOLD
from longctx_layers.evals.tasks.base import NEEDLE, STREAMING
from longctx_layers.reports.checkpoint import Checkpoint, tokenizers_differ
from longctx_layers.reports.content import Part, Picture, Section, Table, Warned
from longctx_layers.reports.results import SLOPES, Results
from longctx_layers.reports.sections import evaluation_pictures as pictures
from longctx_layers.reports.words import or_dash

OVER_PARTS = "95 % interval over parts of the text"
TOKENIZERS_DIFFER = (
    "The checkpoints have different tokenizers: their losses per token, perplexities and "
    f"accuracies in {STREAMING} are not comparable. Only the bits per byte in the section Loss by "
    "position can be compared."
)

Known = Sequence[tuple[Checkpoint, Results]]
CheckpointRows = Sequence[tuple[Checkpoint, Sequence[Row]]]


def section(checkpoints: Sequence[Checkpoint], results: Sequence[Results | None]) -> Section:
    """How well the checkpoints remember, as far as it was measured."""
    known = [(c, r) for c, r in zip(checkpoints, results, strict=True) if r is not None]
    missing = [c for c, r in zip(checkpoints, results, strict=True) if r is None]
    parts: list[Part] = [
        f"No evaluation of {checkpoint.label} was found. Run python -m "
        f"longctx_layers.evals.synthetic --task TASK --checkpoint_path {checkpoint.path}, and then "
        "this report again."
        for checkpoint in missing
    ]
    tasks = dict.fromkeys(task for _, r in known for task in r.by_length)
    if known:
        folders = ", ".join(dict.fromkeys(str(r.folder) for _, r in known))
        parts.append(
            f"Results of longctx_layers.evals.synthetic, read from {folders}. {_intervals(tasks)} "
            "Zeroed is the accuracy with the recurrent state cleared before the question: what "
            "remains of the accuracy there was not carried by the state. The reach is how many "
            "tokens back the stacked windows see."
        )
    for task in tasks:
        rows = [(c, r.by_length[task]) for c, r in known if task in r.by_length]
        parts += _stream(rows, known) if task == STREAMING else _task(task, rows, known)
    numbers = {c.label: {**r.by_length, "depths": r.by_depth} for c, r in known}
    return Section("Evaluation", parts, numbers)


def _intervals(tasks: Collection[str]) -> str:
    """What the intervals in the tables of these tasks are."""
    sentences: list[str] = []
    if set(tasks) - {STREAMING}:
        sentences.append("Intervals are Wilson's of 95 %.")
    if STREAMING in tasks:
        sentences.append(f"That of {STREAMING} is a {OVER_PARTS}.")
    return " ".join(sentences)


def _task(task: str, rows: CheckpointRows, known: Known) -> list[Part]:
    parts: list[Part] = [
        _table(task, rows),
        Picture(task, f"{task}: accuracy by length", pictures.draw_lengths(task, rows)),
    ]
    if task == NEEDLE:
        depths = [(c, r.by_depth) for c, r in known if r.by_depth]
        caption = "Needle: accuracy by depth and length"
        parts.append(Picture("needle_depths", caption, pictures.draw_needle(depths)))
    elif task in TASKS and TASKS[task].drawn_by_place:
        name = task.replace("_", " ").capitalize()
        caption = f"{name}: accuracy and loss by the distance of the question"
        picture = pictures.draw_places(name, _by_place(task, known))
        parts.append(Picture(f"{task}_places", caption, picture))
    return [*parts, *(verdict for c, own in rows for verdict in _verdict(task, c, own))]


def _stream(rows: CheckpointRows, known: Known) -> list[Part]:
    parts: list[Part] = [_table(STREAMING, rows)]
    differ = tokenizers_differ([checkpoint for checkpoint, _ in rows])
    if differ:
        parts.append(Warned(TOKENIZERS_DIFFER))
    caption = "Loss by position of a long stream of text"
    picture = pictures.draw_stream(_by_place(STREAMING, known), differ)
    parts.append(Picture(STREAMING, caption, picture))
    parts += [_drift(c, own[-1]) for c, own in rows]
    return [*parts, *(verdict for c, own in rows for verdict in _verdict(STREAMING, c, own))]


def _by_place(task: str, known: Known) -> CheckpointRows:
    return [(c, r.by_place[task]) for c, r in known if r.by_place.get(task)]


def _table(task: str, rows: CheckpointRows) -> Table:
    lengths = sorted({row["length"] for _, own in rows for row in own})
    cells = [
        [
            f"{length:,}",
            checkpoint.label,
            f"{row['accuracy']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['chance']:.3f}",
            or_dash(row["accuracy_state_zeroed"], "{:.3f}"),
            or_dash(row.get("loss"), "{:.3f}"),
            f"{row['n']:,}",
            or_dash(row["reach"], "{:,}"),
        ]
        for length in lengths
        for checkpoint, own in rows
        for row in own
        if row["length"] == length
    ]
    streaming = task == STREAMING
    header = [
        f"{task}, length (tokens)",
        "checkpoint",
        "accuracy",
        OVER_PARTS if streaming else "95 % interval",
        "chance",
        "zeroed",
        "loss (nats)",
        "tokens" if streaming else "sequences",
        "reach",
    ]
    return Table(header, cells)


def _verdict(task: str, checkpoint: Checkpoint, rows: Sequence[Row]) -> list[Part]:
    """What the rows mean, and a warning if they are no result."""
    label = checkpoint.label
    if not all(row.get("trained", True) for row in rows):
        return [Warned(f"{label} was not trained: its scores in {task} are chance.")]
    if all(row["low"] <= row["chance"] for row in rows):
        return [Warned(f"{label} is at chance in {task} at every length: it has not learnt it.")]
    if task == STREAMING:  # no model reaches the threshold on text
        return []
    length = effective_length({row["length"]: row["accuracy"] for row in rows}, THRESHOLD)
    words = "none" if length is None else f"{length:,} tokens"
    return [f"{label}, effective length in {task} (accuracy at least {THRESHOLD}): {words}."]


def _drift(checkpoint: Checkpoint, row: Row) -> str:
    slope, low, high = (row.get(name) for name in SLOPES)
    result = "the text is too short for a slope of the loss"
    if slope is not None and low is not None and high is not None and math.isfinite(slope):
        trend = "rises" if low > 0 else "falls" if high < 0 else "neither rises nor falls"
        result = (
            f"the loss {trend} with the position: {slope:+.5f} nats per 1,000 tokens ({low:+.5f} "
            f"to {high:+.5f}), each part of the text compared with itself at other positions"
        )
    unknown = "" if row.get("held_out") else " It is not known whether it was trained on this text."
    return (
        f"{checkpoint.label}: after {row['slope_from']:,} tokens, {result}; perplexity "
        f"{row['perplexity']:.3f} in the second half of {row['length']:,} tokens.{unknown}"
    )
