"""Targets of single layers: against their linear floor, torch, peers, their own length and bf16."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.common import RUNS
from benchmarks.speed.contenders import COMPILED, FLOOR, case
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

# Forward, and forward with backward.
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
    """Contenders in turns."""
    calls = {name: RUNS[run](case(name, shape_of(args), length), **options) for name in names}
    return interleave(calls, rounds=args.rounds, seconds=args.seconds)


def floor(args: argparse.Namespace) -> Iterator[Row]:
    """A layer over its own linear projections."""
    layers = args.layers
    compiled = [name + COMPILED for name in layers if args.compile]
    for run, which in (("forward", 0), ("forward+backward", 1)):
        times = timed([*layers, *compiled, *(FLOOR + n for n in layers)], run, args.length, args)
        for name in [*layers, *compiled]:
            under = times[FLOOR + name.removesuffix(COMPILED)]
            bound = FLOORS[name][which] if name in FLOORS else None
            yield ratio(f"{name} / its linears, {run}", times[name], under, at_most=bound)


def sdpa(args: argparse.Namespace) -> Iterator[Row]:
    """Torch's full causal attention, with its projections, over DPASSM."""
    bounds = ((1, "forward+backward", 1.8), (4, "forward+backward", 5.0), (16, "forward", 15.0))
    for longer, run, bound in bounds:
        length = longer * args.length
        times = timed([SDPA, "dpassm"], run, length, args)
        what = f"{SDPA} / dpassm, {run} at {length:,}"
        yield ratio(what, times[SDPA], times["dpassm"], at_least=bound)


def peers(args: argparse.Namespace) -> Iterator[Row]:
    """Other libraries over ours, forward with backward."""
    bounds = {
        WIDE_MAMBA2: ("dpassm", 2.3),  # as it comes: the target's
        MAMBA2: ("dpassm", None),  # at dpassm's own width
        MAMBAPY: ("dpassm", 5.0),
        LOCAL_ATTENTION: ("window", 1.5),
    }
    run = "forward+backward"
    for peer, (ours, bound) in bounds.items():
        check(peer)
        # In pairs: nobody's memory is a third one's affair.
        times = timed([peer, ours], run, args.length, args)
        yield ratio(f"{peer} / {ours}, {run}", times[peer], times[ours], at_least=bound)


def slopes(args: argparse.Namespace) -> Iterator[Row]:
    """Exponents of time and memory in the length, from half of `--length` to eight times it."""
    lengths = [args.length // 2 * 2**i for i in range(5)]
    span = f"{lengths[0]:,} to {lengths[-1]:,}"
    for run, through in RUNS.items():
        calls = {
            f"{name} {length}": through(case(name, shape_of(args), length))
            for length in lengths
            for name in args.layers
        }
        times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
        for name in args.layers:
            seconds = [times[f"{name} {length}"].median for length in lengths]
            detail = ", ".join(f"{value:.3g}" for value in seconds) + " s"
            what = f"{name}, slope of time, {run}, {span}"
            yield Row(what, slope(lengths, seconds), "", at_most=1.08, detail=detail)
            if args.no_memory:
                continue
            peaks = [peak_bytes(passes, name, run, length, shape_of(args)) for length in lengths]
            detail = ", ".join(f"{value / 2**20:,.0f}" for value in peaks) + " MiB"
            what = f"{name}, slope of memory, {run}, {span}"
            yield Row(what, slope(lengths, peaks), "", at_most=1.05, detail=detail)


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak of forward with backward beside those with the same window."""
    length, run, least = 4 * args.length, "forward+backward", None
    for name in [LOCAL_ATTENTION, MASKED_SDPA, *args.layers]:
        peak = peak_bytes(passes, name, run, length, shape_of(args))
        what = f"{name}, peak of {run} at {length:,}"
        if peak is None:
            yield Row(what, kibibytes("meminfo", "MemTotal") / 2**10, "MiB", detail="does not fit")
            continue
        mebibytes = peak / 2**20
        ours = name in args.layers
        yield Row(what, mebibytes, "MiB", at_most=least if ours else None)
        if not ours:
            least = mebibytes if least is None else min(least, mebibytes)


def bf16(args: argparse.Namespace) -> Iterator[Row]:
    """float32 over autocast to bfloat16."""
    for run, through in RUNS.items():
        cases = {name: case(name, shape_of(args), args.length) for name in args.layers}
        calls = {
            f"{n} {half}": through(c, half) for n, c in cases.items() for half in (False, True)
        }
        times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
        for name in args.layers:
            what = f"{name}, float32 / bf16, {run}"
            yield ratio(what, times[f"{name} False"], times[f"{name} True"], at_least=2.0)
