"""What the device itself reaches, to hold kernels against: `python gpu/rates.py --out rates.json`.

Bytes a second of a copy, and operations a second of a large matrix product in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(call: Callable[[], Any], device: str, rounds: int = 20) -> float:
    """The median of some rounds, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        if device == "cpu":
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def rates(device: str) -> dict[str, float]:
    """Bytes and operations a second."""
    elements = 2**29 if device == "cuda" else 2**20
    source, target = torch.zeros(2, elements, dtype=torch.bfloat16, device=device)
    copy = seconds(lambda: target.copy_(source), device)
    width = 8192 if device == "cuda" else 256
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    product = seconds(lambda: a @ b, device)
    return {
        "bytes_per_second": 2 * 2 * elements / copy,  # read and written, two bytes each
        "operations_per_second": 2 * width**3 / product,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("rates.json"))
    args = parser.parse_args(argv)
    measured = rates(args.device)
    print(f"copy {measured['bytes_per_second'] / 1e9:.0f} GB/s")
    print(f"matrix product {measured['operations_per_second'] / 1e12:.1f} TFLOP/s")
    args.out.write_text(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
