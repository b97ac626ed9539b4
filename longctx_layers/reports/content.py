"""What a report consists of, apart from how it is written down."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Rows of cells under a header; the first column names the rows.

    Attributes:
        words: whether the cells are words, and so begin at the left.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


class Picture(NamedTuple):
    """A PNG under a file name without ending, and what it shows, in words."""

    name: str
    shows: str
    png: bytes


class Sample(NamedTuple):
    """A prompt, and what the model went on with."""

    prompt: str
    continuation: str


class Warned(str):
    """A paragraph that must not be overlooked."""


Part = str | Table | Picture | Sample


@dataclass
class Section:
    """A part of the page, and the numbers behind it for the JSON file."""

    title: str
    parts: list[Part]
    numbers: dict[str, Any] = field(default_factory=dict)


def visible(text: str) -> str:
    """The text with its control characters made visible, but for line feeds and tabs.

    Those that reorder or break lines too: a text can't look like another one on the page.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 32:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 127:
        return "\u2421"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return character
