"""Formatting of numbers and of long names."""

from __future__ import annotations

import re

MIB = 2**20


def size(count: float) -> str:
    """A number of bytes in the largest unit that leaves a number of at least 1.

    >>> size(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, broken after spaces and slashes.

    >>> wrapped("some/folder/name", 8)
    'some/\\nfolder/\\nname'
    """
    parts = re.findall(r"[^ /]*[ /]|[^ /]+", text)
    lines = [""]
    short_parts = (part[i : i + width] for part in parts for i in range(0, len(part), width))
    for part in short_parts:
        if len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def or_dash(value: float | None, form: str) -> str:
    """The formatted number, or a dash for None.

    >>> or_dash(None, "{:.3f}"), or_dash(0.5, "{:.3f}")
    ('-', '0.500')
    """
    return "-" if value is None else form.format(value)
