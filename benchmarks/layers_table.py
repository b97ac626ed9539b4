"""One table: time and peak memory of every layer, beside torch's full causal attention.

    python benchmarks/layers_table.py [--lengths 1024 8192 32768] [--output reports/bench]

Times are medians of rounds in which all contenders take turns, in one process. Peak memory is
measured in a process of its own for each cell: the growth of the resident set's high-water mark
over what it was with the layer and its input in place. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import SDPA, contenders, forward, forward_backward

RUNS = {"forward": forward, "forward+backward": forward_backward}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--n-heads", type=int, default=12)
    parser.add_argument("--local", type=int, default=128, help="window or chunk size")
    parser.add_argument("--rounds", type=int, default=5, help="of short runs; long ones take 3")
    parser.add_argument("--output", type=Path, default=Path("reports/bench"))
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def resident_peak() -> int:
    """Bytes; not getrusage's ru_maxrss, which a new process inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def memory_cell(args: argparse.Namespace) -> None:
    """Print the bytes by which one run of one layer raises the process's high-water mark."""
    name, run, length = args.memory_of
    layer = contenders(args.d_model, args.n_heads, args.local)[name]
    small = torch.randn(1, 256, args.d_model, requires_grad=True)
    RUNS[run](layer, small)()  # thread pools and libraries are loaded now
    x = torch.randn(1, int(length), args.d_model, requires_grad=True)
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, not to the next tensors
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use
    before = resident_peak()
    RUNS[run](layer, x)()
    print(resident_peak() - before)


def memory(args: argparse.Namespace, name: str, run: str, length: int) -> int:
    command = [
        sys.executable, __file__, "--memory-of", name, run, str(length),
        "--d-model", str(args.d_model), "--n-heads", str(args.n_heads), "--local", str(args.local),
    ]  # fmt: skip
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def times(args: argparse.Namespace, run: str, length: int) -> dict[str, float]:
    layers = contenders(args.d_model, args.n_heads, args.local)
    x = torch.randn(1, length, args.d_model, requires_grad=True)
    calls = {name: RUNS[run](layer, x) for name, layer in layers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + (args.rounds if length < 16384 else 3)):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        f"`python {' '.join(sys.argv)}`: torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}; float32, "
        f"batch 1, d_model {args.d_model}, {args.n_heads} heads, window or chunk {args.local}. "
        f"In brackets: {SDPA}'s time over the layer's.",
        "",
    ]
    heads = [f"{run} at {n}" for n in args.lengths for run in RUNS]
    lines += ["| layer | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    by_name: dict[str, list[str]] = {}
    for row in rows:
        cell = f"{row['seconds']:.3g} s ({row['speedup']:.2g}), {row['peak_bytes'] / 2**20:.0f} MiB"
        by_name.setdefault(row["layer"], []).append(cell)
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in by_name.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse()
    if args.memory_of:
        memory_cell(args)
        return
    rows = []
    for length in args.lengths:
        for run in RUNS:
            measured = times(args, run, length)
            for name, seconds in measured.items():
                row = {"layer": name, "run": run, "length": length, "seconds": seconds}
                row["speedup"] = measured[SDPA] / seconds
                row["peak_bytes"] = memory(args, name, run, length)
                rows.append(row)
                print(json.dumps(row), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "layers.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.output / "layers.md").write_text(table(rows, args))
    print(table(rows, args))


if __name__ == "__main__":
    main()
