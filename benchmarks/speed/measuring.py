"""How it is measured: rounds in which contenders take turns, memory in processes of their own."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.speed.common import Shape
from longctx_layers.command_line import add_output


class Timing(NamedTuple):
    """Seconds of one contender: the median of its rounds, and the quartiles."""

    median: float
    low: float
    high: float
    rounds: int


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 9, seconds: float = 60.0
) -> dict[str, Timing]:
    """Time calls in turns, so that what disturbs the machine disturbs them all.

    A round to warm up is not counted. Three rounds are taken at least, and no further one after
    `seconds`.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


class Row(NamedTuple):
    """One target: what was measured, and its bound; a report without one."""

    what: str
    measured: float
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bounds hold; None without any."""
        if self.at_most is None and self.at_least is None:
            return None
        low = self.at_least is None or self.measured >= self.at_least
        return low and (self.at_most is None or self.measured <= self.at_most)


def ratio(what: str, over: Timing, under: Timing, **bounds: float | None) -> Row:
    """A row with the ratio of two medians."""
    detail = f"{over.median:.4g} s / {under.median:.4g} s"
    return Row(what, over.median / under.median, detail=detail, **bounds)


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Exponent p of `values ~ lengths ** p`, by least squares of the logarithms."""
    x = [math.log(n) for n in lengths]
    y = [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def command() -> str:
    """The command line, as it is typed in the checkout's root."""
    script = sys.argv[0]
    if "benchmarks/" in script:
        script = "benchmarks/" + script.rsplit("benchmarks/", 1)[1]
    return " ".join(["python", script, *sys.argv[1:]])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every table."""
    parser.add_argument("--d-model", type=int, default=Shape().d_model)
    parser.add_argument("--n-heads", type=int, default=Shape().n_heads)
    parser.add_argument("--local", type=int, default=Shape().local, help="window or chunk size")
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="no further round after so many, from the third"
    )
    parser.add_argument("--no-memory", action="store_true", help="time alone, which is faster")
    add_output(parser, "--output", "bench")


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that the options ask for."""
    return Shape(args.d_model, args.n_heads, args.local)
