"""What a report consists of, independent of how it is rendered."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Rows of cells under a header; the first column names the rows.

    Attributes:
        words: whether the cells are words, which are aligned to the left.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


class Picture(NamedTuple):
    """A PNG with its file name (without ending), and what it shows, in words."""

    name: str
    shows: str
    png: bytes


class Sample(NamedTuple):
    """A prompt and the text that a model generated after it."""

    prompt: str
    continuation: str


class Warned(str):
    """A paragraph that readers must not overlook."""


Part = str | Table | Picture | Sample


@dataclass
class Section:
    """A part of the page, and the numbers in it for the JSON file."""

    title: str
    parts: list[Part]
    numbers: dict[str, Any] = field(default_factory=dict)


def visible(text: str) -> str:
    """The text with control characters replaced by visible ones, except line feeds and tabs.

    This includes characters that reorder or break lines, so that no text can pose as another.

    >>> visible("a\\x1bb")
    'a␛b'
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


def finite(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: None in their place, at any depth.

    >>> finite({"a": [1.0, math.nan]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
