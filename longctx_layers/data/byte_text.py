"""Bytes as tokens, for small experiments: documents, a split of them, and windows at random places.

>>> training, validation = split(documents(None, 2000), seed=0)
>>> windows(training, count=2, length=16, draw=random.Random(0)).shape
torch.Size([2, 17])
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from longctx_layers.data.sources import stdlib


def documents(text: Path | None, shortest: int) -> list[bytes]:
    """Read documents of at least `shortest` bytes, in a fixed order.

    Args:
        text: a folder, whose files are the documents, or one file, which is cut into documents;
            None for the source files of Python's standard library.
        shortest: shorter documents are left out.

    Raises:
        ValueError: if there are fewer than ten.
    """
    if text is None:
        root = stdlib.root()
        paths = stdlib.source_files()
    elif text.is_file():
        root = text
        paths = [text]
    else:
        root = text
        paths = [p for p in sorted(text.rglob("*")) if not stdlib.SKIPPED & set(_parts(p, text))]
    contents = [path.read_bytes() for path in paths if path.is_file()]
    if root.is_file():
        (content,) = contents
        size = max(4 * shortest, len(content) // 50)
        contents = [content[i : i + size] for i in range(0, len(content), size)]
    contents = [content for content in contents if len(content) >= shortest]
    if len(contents) < 10:
        raise ValueError(
            f"text: expected at least 10 documents of {shortest} bytes under {root}, found "
            f"{len(contents)}; pass --text with a longer file or folder, or a shorter length"
        )
    return contents


def _parts(path: Path, root: Path) -> tuple[str, ...]:
    return path.relative_to(root).parts


def split(contents: list[bytes], seed: int) -> tuple[list[bytes], list[bytes]]:
    """Split documents into training and validation; one in eight is held out, at least two."""
    contents = list(contents)
    random.Random(seed).shuffle(contents)
    held_out = max(2, len(contents) // 8)
    return contents[held_out:], contents[:held_out]


def windows(contents: list[bytes], count: int, length: int, draw: random.Random) -> Tensor:
    """Ids `[count, length + 1]` from random places; longer documents are drawn more often."""
    drawn = draw.choices(contents, weights=[len(d) for d in contents], k=count)
    return torch.stack([stretch(document, length, draw) for document in drawn])


def stretch(document: bytes, length: int, draw: random.Random) -> Tensor:
    """Ids `[length + 1]` from a random place of a document."""
    begin = draw.randrange(len(document) - length)
    part = bytearray(document[begin : begin + length + 1])
    return torch.frombuffer(part, dtype=torch.uint8).long()
