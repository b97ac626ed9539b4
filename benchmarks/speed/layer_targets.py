"""Targets of single layers: their floor, torch, peers, growth with the length, memory, bf16."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.common import RUNS, Shape
from benchmarks.speed.contenders import COMPILED, FLOOR, case, floors
from benchmarks.speed.measuring import Row, Timing, interleave, ratio, shape_of, slope
from benchmarks.speed.memory import kibibytes, passes, peak_bytes
from benchmarks.speed.peers import (
    LOCAL_ATTENTION,
    MAMBA2,
    MAMBAPY,
    MASKED_SDPA,
    SDPA,
    WIDE_MAMBA2,
    check,
)

# The largest ratios to the floor: forward, and forward with backward. All targets here are for the
# layers of this table; other layers of the registry are measured and reported without a target.
FLOORS = {
    "dpassm": (1.5, 1.6),
    "blade": (1.5, 1.6),
    "baseline_longformer": (1.5, 1.6),
    "baseline_bigbird": (2.0, 2.0),
    "window": (None, None),
}


def timed(
    names: list[str], run: str, length: int, args: argparse.Namespace, **options: Any
) -> dict[str, Timing]:
    """Times of interleaved rounds."""
    calls = {name: RUNS[run](case(name, shape_of(args), length), **options) for name in names}
    return interleave(calls, rounds=args.rounds, seconds=args.seconds)


def bound(layer: str, value: float) -> float | None:
    """The bound of a target, None for layers that are only reported."""
    return value if layer in FLOORS else None


def floor(args: argparse.Namespace) -> Iterator[Row]:
    """A layer over its own linear projections."""
    floor_names = floors(args.layers, shape_of(args))
    layers = [name.removeprefix(FLOOR) for name in floor_names]
    compiled = [name + COMPILED for name in layers if args.compile]
    for column, run in enumerate(RUNS):
        times = timed([*layers, *compiled, *floor_names], run, args.length, args)
        for name in [*layers, *compiled]:
            under = times[FLOOR + name.removesuffix(COMPILED)]
            at_most = FLOORS[name][column] if name in FLOORS else None
            yield ratio(f"{name} / its linears, {run}", times[name], under, at_most=at_most)


def sdpa(args: argparse.Namespace) -> Iterator[Row]:
    """Torch's full causal attention, with its projections, over DPASSM."""
    bounds = ((1, "forward+backward", 1.8), (4, "forward+backward", 5.0), (16, "forward", 15.0))
    for multiple, run, at_least in bounds:
        length = multiple * args.length
        times = timed([SDPA, "dpassm"], run, length, args)
        what = f"{SDPA} / dpassm, {run} at {length:,}"
        yield ratio(what, times[SDPA], times["dpassm"], at_least=at_least)


def peers(args: argparse.Namespace) -> Iterator[Row]:
    """Layers of other libraries over those of this one, forward with backward."""
    bounds = {
        WIDE_MAMBA2: ("dpassm", 2.3),  # in its default configuration, to which the target refers
        MAMBA2: ("dpassm", None),  # of the same inner width as dpassm
        MAMBAPY: ("dpassm", 5.0),
        LOCAL_ATTENTION: ("window", 1.5),
    }
    run = "forward+backward"
    for peer, (layer, at_least) in bounds.items():
        check(peer)
        # Two at a time, so that the allocations of a third one do not disturb the measurement.
        times = timed([peer, layer], run, args.length, args)
        yield ratio(f"{peer} / {layer}, {run}", times[peer], times[layer], at_least=at_least)


def peak_that_fits(name: str, run: str, length: int, shape: Shape) -> int:
    """Peak memory of a pass, where a slope needs the number of every length."""
    peak = peak_bytes(passes, name, run, length, shape)
    if peak is None:
        raise MemoryError(
            f"expected {name}, {run} at {length:,} tokens to fit into the memory, but it does not; "
            "use a smaller --length, or --no_memory"
        )
    return peak


def slopes(args: argparse.Namespace) -> Iterator[Row]:
    """Exponents of time and memory in the length, from half of `--length` to eight times it."""
    lengths = [args.length // 2 * 2**i for i in range(5)]
    span = f"{lengths[0]:,} to {lengths[-1]:,}"
    for run, make_run in RUNS.items():
        calls = {
            f"{name} {length}": make_run(case(name, shape_of(args), length))
            for length in lengths
            for name in args.layers
        }
        times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
        for name in args.layers:
            seconds = [times[f"{name} {length}"].median for length in lengths]
            detail = ", ".join(f"{value:.3g}" for value in seconds) + " s"
            what = f"{name}, slope of time, {run}, {span}"
            at_most = bound(name, 1.08)
            yield Row(what, slope(lengths, seconds), "", at_most=at_most, detail=detail)
            if args.no_memory:
                continue
            peaks = [peak_that_fits(name, run, length, shape_of(args)) for length in lengths]
            detail = ", ".join(f"{value / 2**20:,.0f}" for value in peaks) + " MiB"
            what = f"{name}, slope of memory, {run}, {span}"
            at_most = bound(name, 1.05)
            yield Row(what, slope(lengths, peaks), "", at_most=at_most, detail=detail)


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak of forward with backward, compared with that of others that have the same window."""
    length = 4 * args.length
    run = "forward+backward"
    least = math.inf  # of the others
    for name in [LOCAL_ATTENTION, MASKED_SDPA, *args.layers]:
        peak = peak_bytes(passes, name, run, length, shape_of(args))
        what = f"{name}, peak of {run} at {length:,}"
        if peak is None:
            yield Row(what, kibibytes("meminfo", "MemTotal") / 2**10, "MiB", detail="does not fit")
            continue
        mebibytes = peak / 2**20
        if name in args.layers:
            at_most = bound(name, least) if least < math.inf else None
            yield Row(what, mebibytes, "MiB", at_most=at_most)
        else:
            yield Row(what, mebibytes, "MiB")
            least = min(least, mebibytes)


def bf16(args: argparse.Namespace) -> Iterator[Row]:
    """float32 over autocast to bfloat16."""
    for run, make_run in RUNS.items():
        cases = {name: case(name, shape_of(args), args.length) for name in args.layers}
        calls = {
            f"{n} {half}": make_run(c, half) for n, c in cases.items() for half in (False, True)
        }
        times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
        for name in args.layers:
            what = f"{name}, float32 / bf16, {run}"
            at_least = bound(name, 2.0)
            yield ratio(what, times[f"{name} False"], times[f"{name} True"], at_least=at_least)
