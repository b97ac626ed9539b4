"""Numbers as the page writes them."""

from __future__ import annotations

MIB = 2**20


def size(count: float) -> str:
    """Bytes, in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
