"""The results of proofs by block and seed, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.memory.figures import NAMES

Result = dict[str, Any]


def of(results: Sequence[Result], proof: str) -> dict[str, list[Result]]:
    """The results of a proof by block, seeds in order."""
    found: dict[str, list[Result]] = {}
    for name in NAMES:
        seeds = sorted(
            (r for r in results if r["proof"] == proof and r["name"] == name),
            key=lambda r: r["seed"],
        )
        if seeds:
            found[name] = seeds
    return found


def at(result: Result, length: int, **which: Any) -> Result | None:
    """A result's row at a length."""
    for row in result["rows"]:
        if row["length"] == length and all(row[k] == v for k, v in which.items()):
            found: Result = row
            return found
    return None


def values(seeds: Sequence[Result], length: int, what: str, **which: Any) -> list[float]:
    """What the seeds have at a length."""
    rows = [at(result, length, **which) for result in seeds]
    return [row[what] for row in rows if row is not None and row[what] is not None]


def shown(numbers: Sequence[float]) -> str:
    """Every seed, and the median in bold where there are several."""
    if not numbers:
        return "-"
    every = ", ".join(f"{number:.3f}" for number in numbers)
    return f"**{statistics.median(numbers):.3f}** ({every})" if len(numbers) > 1 else every


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def seeds_of(seeds: Sequence[Result]) -> str:
    """The seeds that ran."""
    return ", ".join(str(result["seed"]) for result in seeds)


def judged(seeds: Sequence[Result] | None, length: int, target: float, **which: Any) -> str:
    """Whether the median reaches a target."""
    numbers = values(seeds or [], length, "accuracy", **which)
    if not numbers:
        return "not measured yet"
    middle = statistics.median(numbers)
    verdict = "reached" if middle >= target else "missed"
    return f"{verdict} ({middle:.3f}, {len(numbers)} seed{'s' * (len(numbers) > 1)})"
