"""Results as JSON lines: one object per line, added as they are measured."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from longctx_layers.evals.tasks.base import NEEDLE
from longctx_layers.files import write

Row = dict[str, Any]
BY_LENGTH = ("task", "block", "length")  # the fields that identify a row


def key_of(settings: Mapping[str, Any]) -> str:
    """A short hash, equal for equal settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Rows:
    """A file of JSON lines in which some fields identify a row.

    Args:
        path: the file; it need not exist yet.
        names: the fields that identify a row.

    Raises:
        ValueError: if the file holds anything else.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path = path
        self.names = names
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.dropped: set[tuple[Any, ...]] = set()
        self._read()

    def _read(self) -> None:
        """Add the rows of the file that are not here yet."""
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                name = tuple(row[part] for part in self.names)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: expected a row of an evaluation with "
                    f"{', '.join(self.names)}, got {line[:80]!r}; move the file away, or choose "
                    "another --output_dir"
                ) from error
            if name not in self.dropped:
                self.rows.setdefault(name, row)

    def get(self, *name: Any) -> Row | None:
        """The row with these values of the identifying fields, or None."""
        return self.rows.get(name)

    def others(self, block: str, key: str) -> list[Row]:
        """Rows of a block that were made with other settings."""
        return [r for r in self.rows.values() if r["block"] == block and r.get("key") != key]

    def drop(self, block: str) -> None:
        """Remove a block's rows; the file loses them with the next `add`."""
        self.dropped |= {name for name, row in self.rows.items() if row["block"] == block}
        self.rows = {name: row for name, row in self.rows.items() if row["block"] != block}

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Add rows, or replace those with the same identifying fields, in one atomic write.

        Rows that another process has added in the meantime are kept.
        """
        lock = f"longctx-rows-{key_of({'path': str(self.path.resolve())})}.lock"
        with FileLock(Path(tempfile.gettempdir()) / lock):
            self._read()
            for row in rows:
                self.rows[tuple(row[name] for name in self.names)] = dict(row)
            lines = [json.dumps(row, allow_nan=False) for row in self.rows.values()]
            write(self.path, "\n".join(lines) + "\n")


def rows_by_length(folder: Path, task: str) -> Rows:
    """The main results of an evaluation."""
    return Rows(folder / f"{task}.jsonl", BY_LENGTH)


def detail_of(task: str) -> str:
    """What the detailed results of an evaluation are by: `depth` or `place`."""
    return "depth" if task == NEEDLE else "place"


def detailed_rows(folder: Path, task: str) -> Rows:
    """The results of an evaluation by depth or place, in a file of their own."""
    detail = detail_of(task)
    return Rows(folder / f"{task}_{detail}s.ndjson", (*BY_LENGTH, detail))
