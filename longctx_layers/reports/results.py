"""What examples/evaluate.py has measured of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from longctx_layers.evals.program.measuring import FURTHER, folder_name
from longctx_layers.evals.program.models import fingerprint
from longctx_layers.evals.program.options import NAMES, NEEDLE, STREAMING
from longctx_layers.evals.program.rows import Rows
from longctx_layers.reports.checkpoint import Checkpoint

Row = dict[str, Any]
MEASURED = ("length", "accuracy", "n", "chance", "low", "high")
OPTIONAL = ("accuracy_state_zeroed", "reach")
# Of streaming perplexity beside these; there is no slope where the text is too short for one.
STREAMED = ("loss", "perplexity", "slope_from")
SLOPES = ("slope", "slope_low", "slope_high")
BY_PLACE = {NEEDLE: ("accuracy", "chance"), "drift_curve": ("accuracy", "loss")}


@dataclass
class Results:
    """The rows of one checkpoint.

    Attributes:
        by_length: of a task, in the order of lengths.
        by_place: of a task, by the place of the question, or of the token (streaming perplexity).
        by_depth: of the needle grid.
    """

    folder: Path
    by_length: dict[str, list[Row]] = field(default_factory=dict)
    by_place: dict[str, list[Row]] = field(default_factory=dict)
    by_depth: list[Row] = field(default_factory=list)


def find(checkpoint: Checkpoint, folder: Path | None = None) -> Results | None:
    """The rows in a folder that are of this checkpoint; None without any.

    Args:
        folder: an `--output_dir` of examples/evaluate.py; where it writes by default unless given.

    Raises:
        ValueError: if a file there is not one of evaluations.
    """
    place = _default(checkpoint) if folder is None else folder
    found = Results(place)
    for task in NAMES:
        names = ("task", "block", "length")
        rows = _own(checkpoint, place / f"{task}.jsonl", names)
        if not rows:
            continue
        for row in rows:
            numbers, optional = MEASURED, OPTIONAL
            if task == STREAMING:
                numbers, optional = (*numbers, *STREAMED), (*optional, *SLOPES)
            _check(row, place / f"{task}.jsonl", numbers, optional)
        found.by_length[task] = sorted(rows, key=lambda row: row["length"])
        keys = {row["key"] for row in rows}
        kind, name = ("depths", "depth") if task == NEEDLE else ("places", "place")
        path = place / f"{task}_{kind}{FURTHER}"
        own = [r for r in Rows(path, (*names, name)).rows.values() if r.get("key") in keys]
        for row in own:
            _check(row, path, ("length", name, *BY_PLACE.get(task, ("loss",))))
        own.sort(key=lambda row: row[name])
        if task == NEEDLE:
            found.by_depth = own
        else:
            found.by_place[task] = own
    return found if found.by_length else None


def _default(checkpoint: Checkpoint) -> Path:
    folder = Path(os.path.normpath(checkpoint.path.parent))
    if folder.name == "models":  # trained by examples/evaluate.py, beside its rows
        return folder.parent
    return Path("reports/evaluation", folder_name(checkpoint.path))


def _own(checkpoint: Checkpoint, path: Path, names: tuple[str, ...]) -> list[Row]:
    """Rows of this very model."""
    rows = list(Rows(path, names).rows.values())
    if not rows:
        return []
    for row in rows:
        if missing := [n for n in ("model", "key") if not isinstance(row.get(n), str)]:
            raise _foreign(row, path, "a model and a key", missing)
    # Trained on the task afterwards, it is the model in the folder with the row's key.
    name, own = checkpoint.path.resolve().name, fingerprint(checkpoint.model)
    return [
        row
        for row in rows
        if (name.endswith(f"-{row['key']}") if row.get("train_steps") else row["model"] == own)
    ]


def _check(row: Row, path: Path, numbers: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    wrong = [name for name in numbers if not isinstance(row.get(name), Real)]
    wrong += [n for n in optional if not (row.get(n) is None or isinstance(row[n], Real))]
    if wrong:
        raise _foreign(row, path, f"numbers for {', '.join(numbers)}", wrong)


def _foreign(row: Row, path: Path, expected: str, missing: list[str]) -> ValueError:
    return ValueError(
        f"{path}: expected rows with {expected}, got none for {', '.join(missing)} in that of "
        f"{row['block']} at length {row['length']}; it is another program's or an older version's: "
        "move the file away, and run examples/evaluate.py again"
    )
