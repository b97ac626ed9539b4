"""Types of columns, in the words of messages, and what messages about columns share."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from longctx_layers.data.errors import DataError

READABLE = ("string", "bytes", "null")
STRINGS = ("string", "bytes", "binary")  # `binary` is what `datasets` calls bytes
NESTED = ("a list", "an object")
LONGEST_NAME = 80  # of a column, in a message


def missing(path: Path, column: str, names: Iterable[str]) -> DataError:
    """The error about a file without the column that the others have."""
    return DataError(
        f"{path}: expected a column {column!r} as in the other files, got "
        f"{', '.join(map(short, islice(names, 20)))}; rename it, or keep the file elsewhere"
    )


def short(name: str) -> str:
    """A column's name, cut if it is long: a line of text may have been taken for a name."""
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."
