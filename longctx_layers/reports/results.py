"""The results of evaluations of a checkpoint, read from the files that the program wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

from longctx_layers.evals import TASKS
from longctx_layers.evals.program.measuring import folder_name
from longctx_layers.evals.program.models import fingerprint
from longctx_layers.evals.program.options import task_names
from longctx_layers.evals.program.rows import Row, detail_of, detailed_rows, rows_by_length
from longctx_layers.evals.tasks.base import NEEDLE, STREAMING
from longctx_layers.reports.checkpoint import Checkpoint

MEASURED = ("length", "accuracy", "n", "chance", "low", "high")
OPTIONAL = ("accuracy_state_zeroed", "reach")
# Streaming perplexity has these in addition; there is no slope if the text is too short for one.
STREAMED = ("loss", "perplexity", "slope_from")
SLOPES = ("slope", "slope_low", "slope_high")


@dataclass
class Results:
    """The rows of one checkpoint.

    Attributes:
        folder: where they are.
        by_length: by task, in the order of lengths.
        by_place: by task, by the position of the question, or of the token (streaming perplexity).
        by_depth: of the needle grid.
    """

    folder: Path
    by_length: dict[str, list[Row]] = field(default_factory=dict)
    by_place: dict[str, list[Row]] = field(default_factory=dict)
    by_depth: list[Row] = field(default_factory=list)


def find(checkpoint: Checkpoint, folder: Path | None = None) -> Results | None:
    """The rows of this checkpoint in a folder; None if there are none.

    Args:
        checkpoint: whose rows are wanted.
        folder: an `--output_dir` of an evaluation; by default where the program would write.

    Raises:
        ValueError: if a file there was not written by an evaluation.
    """
    folder = _default(checkpoint) if folder is None else folder
    results = Results(folder)
    for task in task_names():
        rows = _own_rows(checkpoint, folder, task)
        if not rows:
            continue
        results.by_length[task] = sorted(rows, key=lambda row: row["length"])
        details = _details(folder, task, {row["key"] for row in rows})
        if task == NEEDLE:
            results.by_depth = details
        else:
            results.by_place[task] = details
    return results if results.by_length else None


def _default(checkpoint: Checkpoint) -> Path:
    folder = Path(os.path.normpath(checkpoint.path.parent))
    if folder.name == "models":  # trained by the evaluation program, which wrote rows beside it
        return folder.parent
    return Path("reports/evaluation", folder_name(checkpoint.path))


def _own_rows(checkpoint: Checkpoint, folder: Path, task: str) -> list[Row]:
    """The rows by length of this very model, checked."""
    file = rows_by_length(folder, task)
    rows = list(file.rows.values())
    if not rows:
        return []
    for row in rows:
        if missing := [n for n in ("model", "key") if not isinstance(row.get(n), str)]:
            raise _not_a_result(row, file.path, "a model and a key", missing)
    # A model that was then trained on the task lies in a folder that is named after the row's key.
    name = checkpoint.path.resolve().name
    own = fingerprint(checkpoint.model)
    rows = [
        row
        for row in rows
        if (name.endswith(f"-{row['key']}") if row.get("train_steps") else row["model"] == own)
    ]
    streaming = task == STREAMING
    for row in rows:
        _check(
            row,
            file.path,
            (*MEASURED, *STREAMED) if streaming else MEASURED,
            (*OPTIONAL, *SLOPES) if streaming else OPTIONAL,
        )
    return rows


def _details(folder: Path, task: str, keys: set[str]) -> list[Row]:
    """The rows by depth or place that belong to the rows with these keys, checked."""
    file = detailed_rows(folder, task)
    detail = detail_of(task)
    rows = [row for row in file.rows.values() if row.get("key") in keys]
    numbers = ["length", detail]
    if task == NEEDLE:
        numbers += ["accuracy", "chance"]
    elif task in TASKS and TASKS[task].drawn_by_place:
        numbers += ["accuracy", "loss"]
    else:
        numbers += ["loss"]
    for row in rows:
        _check(row, file.path, tuple(numbers))
    return sorted(rows, key=lambda row: row[detail])


def _check(row: Row, path: Path, numbers: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    wrong = [name for name in numbers if not isinstance(row.get(name), Real)]
    wrong += [n for n in optional if not (row.get(n) is None or isinstance(row[n], Real))]
    if wrong:
        raise _not_a_result(row, path, f"numbers for {', '.join(numbers)}", wrong)


def _not_a_result(row: Row, path: Path, expected: str, missing: list[str]) -> ValueError:
    return ValueError(
        f"{path}: expected rows with {expected}, got none for {', '.join(missing)} in the row of "
        f"{row['block']} at length {row['length']}; another program or an older version wrote it: "
        "move the file away, and evaluate again"
    )
