"""Numbers as the page writes them, and names as its pictures do."""

from __future__ import annotations

import re

MIB = 2**20


def size(count: float) -> str:
    """Bytes, in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, broken behind spaces and slashes."""
    parts = re.findall(r"[^ /]*[ /]|[^ /]+", text)
    lines = [""]
    for part in (whole[i : i + width] for whole in parts for i in range(0, len(whole), width)):
        if len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
