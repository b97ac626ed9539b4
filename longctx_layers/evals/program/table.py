"""What an evaluation prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longctx_layers.evals import effective_length
from longctx_layers.evals.program.rows import Row
from longctx_layers.evals.tasks.base import STREAMING

THRESHOLD = 0.9
UNTRAINED = """\
!!! THIS MODEL WAS NOT TRAINED: its weights are random, and its scores are chance, not a result.
!!! Train it on the task with --train_steps, or pass a model with --checkpoint_path. Its rows are
!!! marked "trained": false.
"""


def warn_untrained() -> None:
    """Print a warning that the model has learnt nothing."""
    print(f"\n{UNTRAINED}", flush=True)


def table(rows: Sequence[Row], folder: Path) -> str:
    """The rows by length, what they mean, and the folder that they are in."""
    first = rows[0]
    streaming = first["task"] == STREAMING
    unit = "tokens" if streaming else "sequences of each length"
    lines = [
        "",
        f"{first['task']}, {first['block']}: {first['n']:,} {unit}",
        "",
        "  length  accuracy  95 % interval   chance  state zeroed     loss",
        *(_line(row, first["n"]) for row in rows),
        "",
        "reach of the stacked windows: " + _tokens(first["reach"], "everything"),
    ]
    lines += _drift(rows[-1]) if streaming else [_effective_length(rows)]
    at_chance = [row["length"] for row in rows if row["low"] <= row["chance"]]
    if at_chance and first["trained"]:
        lines.append(f"At {at_chance} tokens it does no better than chance, within the interval.")
    reach = first["reach"]
    if reach is not None and (within := [r["length"] for r in rows if r["length"] <= reach + 1]):
        lines.append(f"At {within} tokens the windows alone see everything: no test of the memory.")
    if not first["trained"]:
        lines += ["", UNTRAINED]
    lines.append(f"Written to {folder}/")
    return "\n".join(lines)


def _line(row: Row, usual_n: int) -> str:
    zeroed = row["accuracy_state_zeroed"]
    return (
        f"{row['length']:>8,}  {row['accuracy']:>8.3f}  {row['low']:.3f} - {row['high']:.3f}  "
        f"{row['chance']:>7.3f}  {'-' if zeroed is None else f'{zeroed:.3f}':>12}  "
        f"{row['loss']:>7.3f}" + (f"  n = {row['n']}" if row["n"] != usual_n else "")
    )


def _effective_length(rows: Sequence[Row]) -> str:
    length = effective_length({row["length"]: row["accuracy"] for row in rows}, THRESHOLD)
    return f"effective length (accuracy at least {THRESHOLD}): {_tokens(length, 'none')}"


def _drift(row: Row) -> list[str]:
    """The slope of the loss, which is of the whole text."""
    slope = row["slope"]
    if slope is None:
        result = "not measured, because there is too little text; make --max_len longer"
    else:
        interval = f"{row['slope_low']:.5f} to {row['slope_high']:.5f}"
        result = f"{slope:.5f} nats per 1000 tokens ({interval})"
    lines = [f"drift of the loss after {row['slope_from']:,} tokens: {result}"]
    if row["held_out"] is None and row["trained"]:
        lines.append("It is not known whether the model was trained on this text.")
    return lines


def _tokens(count: int | None, none: str) -> str:
    return none if count is None else f"{count:,} tokens"
