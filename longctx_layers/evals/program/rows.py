"""Results as JSON lines: one object a line, added as they come, kept whole."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from longctx_layers.files import write


def key_of(settings: Mapping[str, Any]) -> str:
    """Equal for equal settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Rows:
    """A file of JSON lines in which each row has a name of its own.

    Args:
        path: the file; it need not be there yet.
        names: the fields that tell rows apart.

    Raises:
        ValueError: if the file holds anything else.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self.names = path, names
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.dropped: set[tuple[Any, ...]] = set()
        self._read()

    def _read(self) -> None:
        """Add what is in the file and not here."""
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

    def get(self, *name: Any) -> dict[str, Any] | None:
        """The row of that name, or None."""
        return self.rows.get(name)

    def others(self, block: str, key: str) -> list[dict[str, Any]]:
        """Rows of a block that were made with other settings."""
        return [r for r in self.rows.values() if r["block"] == block and r.get("key") != key]

    def drop(self, block: str) -> None:
        """Leave a block's rows out from the next `add` on."""
        self.dropped |= {name for name, row in self.rows.items() if row["block"] == block}
        self.rows = {name: row for name, row in self.rows.items() if row["block"] != block}

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Add rows, or replace those of the same names; the file is whole at any moment.

        Rows that another process has added to it meanwhile are kept.
        """
        lock = f"longctx-rows-{key_of({'path': str(self.path.resolve())})}.lock"
        with FileLock(Path(tempfile.gettempdir()) / lock):
            self._read()
            for row in rows:
                self.rows[tuple(row[name] for name in self.names)] = dict(row)
            lines = [json.dumps(row, allow_nan=False) for row in self.rows.values()]
            write(self.path, "\n".join(lines) + "\n")
