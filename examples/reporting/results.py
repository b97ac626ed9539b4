"""What examples/evaluate.py has measured of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from evaluation.measuring import FURTHER, folder_name
from evaluation.models import fingerprint
from evaluation.options import NAMES, NEEDLE
from evaluation.rows import Rows

from reporting.checkpoint import Checkpoint

Row = dict[str, Any]
MEASURED = ("accuracy", "n", "chance", "low", "high")
OPTIONAL = ("accuracy_state_zeroed", "reach")


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
            _check(row, place / f"{task}.jsonl")
        found.by_length[task] = sorted(rows, key=lambda row: row["length"])
        keys = {row["key"] for row in rows}
        kind, name = ("depths", "depth") if task == NEEDLE else ("places", "place")
        further = Rows(place / f"{task}_{kind}{FURTHER}", (*names, name)).rows.values()
        own = sorted((r for r in further if r.get("key") in keys), key=lambda r: r[name])
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
    # Trained on the task afterwards, it is the model in the folder with the row's key.
    name, own = checkpoint.path.resolve().name, fingerprint(checkpoint.model)
    return [
        row
        for row in rows
        if (name.endswith(f"-{row.get('key')}") if row.get("train_steps") else row["model"] == own)
    ]


def _check(row: Row, path: Path) -> None:
    wrong = [name for name in MEASURED if not isinstance(row.get(name), Real)]
    wrong += [n for n in OPTIONAL if not (row.get(n) is None or isinstance(row[n], Real))]
    if wrong:
        raise ValueError(
            f"{path}: expected numbers for {', '.join(MEASURED)}, got a row without "
            f"{', '.join(wrong)}; it is another program's: move it away"
        )
