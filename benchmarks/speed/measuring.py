"""How the benchmarks measure time, what a row of a target holds, and the options of all tables."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed.common import ROOT, Shape
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
    """Time calls in interleaved rounds, so that a disturbance of the machine affects all of them.

    The first round warms up and is not counted. At least three rounds are timed, and no further
    one begins after `seconds`.
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
    """One measured number, with the bounds of its target; without bounds it is only reported."""

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


def ratio(
    what: str,
    over: Timing,
    under: Timing,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """A row with the ratio of two medians."""
    detail = f"{over.median:.4g} s / {under.median:.4g} s"
    return Row(what, over.median / under.median, at_most=at_most, at_least=at_least, detail=detail)


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent p of `values ~ lengths ** p`: the slope of a line fitted to the logarithms."""
    x = [math.log(n) for n in lengths]
    y = [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def command() -> str:
    """The running program's command line, as one types it in the root of the checkout."""
    script = Path(sys.argv[0])
    program = [str(script)]
    if script.is_absolute() and script.is_relative_to(ROOT / "benchmarks"):
        program = ["-m", ".".join(script.relative_to(ROOT).with_suffix("").parts)]
    return " ".join(["python", *program, *sys.argv[1:]])


def add_output_dir(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--output_dir` (by default `runs/NAME`), its older name `--output`, and `--publish`."""
    add_output(parser, "--output_dir", name)
    parser.add_argument(
        "--output",
        dest="output_dir",
        type=Path,
        default=argparse.SUPPRESS,
        help="the same as --output_dir",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all tables share."""
    default = Shape()
    parser.add_argument("--d_model", type=int, default=default.d_model, help="width of the layers")
    parser.add_argument("--n_heads", type=int, default=default.n_heads)
    parser.add_argument("--local", type=int, default=default.local, help="window or chunk size")
    parser.add_argument("--rounds", type=int, default=9, help="largest number of timed rounds")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="start no further round after this time (at least three rounds are timed)",
    )
    parser.add_argument(
        "--no_memory", action="store_true", help="measure time only, which is faster"
    )
    add_output_dir(parser, "bench")


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that the options ask for."""
    return Shape(args.d_model, args.n_heads, args.local)
