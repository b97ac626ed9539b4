"""Bytes as tokens: documents of a folder, a split of them, and windows at random places."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def documents(text: Path | None, shortest: int) -> list[bytes]:
    """Documents of at least `shortest` bytes, in a fixed order.

    Raises:
        ValueError: if there are fewer than ten.
    """
    root = Path(sysconfig.get_path("stdlib")) if text is None else text
    pattern = "*.py" if text is None else "*"
    paths = [root] if root.is_file() else sorted(root.rglob(pattern))
    found = []
    for path in paths:
        if path.is_file() and not SKIPPED & set(path.relative_to(root).parts):
            found.append(path.read_bytes())
    if root.is_file():  # one file is cut into documents
        size = max(4 * shortest, len(found[0]) // 50)
        found = [found[0][i : i + size] for i in range(0, len(found[0]), size)]
    found = [document for document in found if len(document) >= shortest]
    if len(found) < 10:
        raise ValueError(
            f"text: expected at least 10 documents of {shortest} bytes under {root}, found "
            f"{len(found)}; pass --text with a longer file or folder, or a shorter length"
        )
    return found


def split(found: list[bytes], seed: int) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents: one in eight is held out."""
    found = list(found)
    random.Random(seed).shuffle(found)
    held_out = max(2, len(found) // 8)
    return found[held_out:], found[:held_out]


def windows(found: list[bytes], count: int, length: int, draw: random.Random) -> Tensor:
    """`[count, length + 1]` ids: windows at random places, documents weighted by length."""
    drawn = draw.choices(found, weights=[len(d) for d in found], k=count)
    return torch.stack([stretch(document, length, draw) for document in drawn])


def stretch(document: bytes, length: int, draw: random.Random) -> Tensor:
    """`[length + 1]` ids from a random place."""
    begin = draw.randrange(len(document) - length)
    part = bytearray(document[begin : begin + length + 1])
    return torch.frombuffer(part, dtype=torch.uint8).long()
