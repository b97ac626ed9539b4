"""Results by block and seed, and how tables show them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.memory.figures import NAMES

Result = dict[str, Any]


def of(results: Sequence[Result], experiment: str) -> dict[str, list[Result]]:
    """The results of an experiment by block, in the order of their seeds."""
    by_block: dict[str, list[Result]] = {}
    for name in NAMES:
        seeds = [r for r in results if r["experiment"] == experiment and r["name"] == name]
        if seeds:
            by_block[name] = sorted(seeds, key=lambda r: r["seed"])
    return by_block


def at(result: Result, length: int, **which: Any) -> Result | None:
    """A result's row at a length, with the other given values; None if there is none."""
    rows: list[Result] = result["rows"]
    wanted = {"length": length, **which}
    matching = (row for row in rows if all(row[k] == v for k, v in wanted.items()))
    return next(matching, None)


def values(seeds: Sequence[Result], length: int, what: str, **which: Any) -> list[float]:
    """One value of each seed at a length."""
    rows = [at(result, length, **which) for result in seeds]
    return [row[what] for row in rows if row is not None and row[what] is not None]


def shown(numbers: Sequence[float]) -> str:
    """The values of all seeds, preceded by their median in bold if there are several."""
    if not numbers:
        return "-"
    every = ", ".join(f"{number:.3f}" for number in numbers)
    return f"**{statistics.median(numbers):.3f}** ({every})" if len(numbers) > 1 else every


def seeds_of(seeds: Sequence[Result]) -> str:
    """The seeds that were run."""
    return ", ".join(str(result["seed"]) for result in seeds)


def judged(seeds: Sequence[Result] | None, length: int, target: float, **which: Any) -> str:
    """Whether the median reaches a target, in words."""
    numbers = values(seeds or [], length, "accuracy", **which)
    if not numbers:
        return "not measured yet"
    middle = statistics.median(numbers)
    verdict = "reached" if middle >= target else "missed"
    return f"{verdict} ({middle:.3f}, {len(numbers)} seed{'s' * (len(numbers) > 1)})"
