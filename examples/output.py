"""What the example programs leave behind, and how losses by position are summed up in it."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(partial, path)


def can_hold_files(folder: Path) -> bool:
    """Whether the folder, or where it will have to be made, is one to write into."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return place.is_dir() and os.access(place, os.W_OK)


def buckets(losses: list[float]) -> list[tuple[int, int, float]]:
    """Mean loss over positions 1-16, 17-32, 33-64, ...: `(first, last, mean)`."""
    found, low, high = [], 0, 16
    while low < len(losses):
        part = losses[low:high]
        found.append((low + 1, low + len(part), sum(part) / len(part)))
        low, high = high, 2 * high
    return found
