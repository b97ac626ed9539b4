"""What the example programs leave behind, and how losses by position are summed up in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(partial, path)


def check_targets(folder: Path, names: Iterable[str]) -> None:
    """Check that files of these names can be written under a folder; nothing stays behind there.

    Raises:
        OSError: if a folder has the name of a file, or no file can be made in one of the folders.
    """
    targets = [folder / name for name in names]
    if taken := [str(target) for target in targets if target.is_dir()]:
        raise IsADirectoryError(
            f"--output_dir: expected files or nothing at {', '.join(taken)}, got a folder; move it "
            "away, or choose another --output_dir"
        )
    for parent in dict.fromkeys([folder, *(target.parent for target in targets)]):
        place = next(p for p in (parent, *parent.absolute().parents) if os.path.lexists(p))
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise OSError(
                f"--output_dir: expected a folder to write into, got {parent} ({error.strerror}); "
                "choose another"
            ) from error


def buckets(losses: list[float]) -> list[tuple[int, int, float]]:
    """Mean loss over positions 1-16, 17-32, 33-64, ...: `(first, last, mean)`."""
    found, low, high = [], 0, 16
    while low < len(losses):
        part = losses[low:high]
        found.append((low + 1, low + len(part), sum(part) / len(part)))
        low, high = high, 2 * high
    return found
