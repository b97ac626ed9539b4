"""Time candidate tiles on a GPU: `python gpu/sweep.py --out sweep.json`.

Every candidate is compiled first, by many processes; then each one's results are compared with
those of the library's own tiles, and timed. Whatever is measured is written at once. Without a GPU,
`--dry` compiles a few for Hopper and launches nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from calls import Run, Shape, calls
from candidates import Candidate, candidates, use
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

COMPILED_DRY = 5  # the library's own tiles of each kernel


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    shape = Shape()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sweep.json"))
    parser.add_argument("--device", default="cuda", help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--dry", action="store_true", help="compile a few for Hopper, on a CPU")
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=75, help="no new candidate after these")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64], help="of attention")
    parser.add_argument("--batch", type=int, default=shape.batch)
    parser.add_argument("--length", type=int, default=shape.length)
    parser.add_argument("--heads", type=int, default=shape.heads)
    parser.add_argument("--window", type=int, default=shape.window)
    parser.add_argument("--limit", type=int, help="how many of them, the first ones")
    return parser.parse_args(argv)


class _Hopper:
    """As much of a GPU's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextmanager
def hopper() -> Iterator[None]:
    """Compile for Hopper, whatever this machine has."""
    active = driver._active
    driver.set_active(_Hopper())
    try:
        yield
    finally:
        driver._active = active


def compile_only(candidate: Candidate, shape: Shape, dry: bool) -> str:
    """Fill Triton's cache and launch nothing; what went wrong, or an empty string."""

    def launch(kernel: Any, grid: Any) -> Any:
        def warm_up(*args: Any, **kwargs: Any) -> None:
            kernel.warmup(*args, grid=grid, **kwargs)

        return warm_up

    try:
        with hopper() if dry else nullcontext():
            use(candidate)
            with patch.object(KernelInterface, "__getitem__", launch):
                for run in calls(candidate.kind, candidate.size, shape, "meta").values():
                    run()
    except Exception as error:  # whatever a compiler may raise: the others are tried all the same
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def compile_all(every: list[Candidate], shape: Shape, jobs: int, dry: bool) -> None:
    """Compile in processes of their own, or here if one is enough."""
    begin = time.perf_counter()
    if jobs > 1:
        # Spawned: a forked process can't use a GPU that its parent has used.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            work = [pool.submit(compile_only, one, shape, dry) for one in every]
            problems = [one.result() for one in work]
    else:
        problems = [compile_only(one, shape, dry) for one in every]
    for candidate, problem in zip(every, problems, strict=True):
        if problem:
            print("not compiled:", *candidate, problem)
    compiled = problems.count("")
    print(f"{compiled} of {len(every)} candidates compiled in {time.perf_counter() - begin:.0f} s")
    if dry and compiled < len(every):
        raise SystemExit("not all candidates compile: see above")


def milliseconds(run: Run, device: str) -> float:
    """The median of many calls; on a CPU, of one."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    from triton.testing import do_bench

    return float(do_bench(run, warmup=8, rep=40, return_mode="median"))


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all outputs."""
    return max(
        ((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-20)).item()
        for x, y in zip(actual, expected, strict=True)
    )


def measure(args: argparse.Namespace, every: list[Candidate], shape: Shape) -> None:
    """Compare and time one candidate after the other."""
    begin = time.perf_counter()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float16  # what the interpreter can
    runs: dict[tuple[str, int], dict[str, Run]] = {}
    expected: dict[tuple[str, int, str], list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for number, candidate in enumerate(every):
        if time.perf_counter() - begin > args.seconds:
            print(f"out of time: {len(every) - number} candidates were not measured")
            break
        use(candidate)
        kind, size, tiles = candidate
        if (kind, size) not in runs:
            runs[kind, size] = calls(kind, size, shape, args.device, dtype)
        for title, run in runs[kind, size].items():
            row = {"kind": kind, "size": size, "shape": title, "tiles": tiles, "ms": None}
            try:
                outputs = [x for x in run() if x.numel()]
                own = expected.setdefault((kind, size, title), [x.clone() for x in outputs])
                row["error"] = relative_error(outputs, own)
                row["ms"] = milliseconds(run, args.device)
            except Exception as error:  # a launch that asks for too much, or a crash
                row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(rows))


def main(argv: list[str] | None = None) -> None:
    """Compile, then measure."""
    args = parse(argv)
    shape = Shape(args.batch, args.length, args.heads, args.window)
    with hopper() if args.dry else nullcontext():
        every = candidates(args.head_dims)
    limit = args.limit or (COMPILED_DRY if args.dry else len(every))
    every = every[:limit]
    if args.device == "cuda":
        jobs = 1 if args.dry else args.jobs
        compile_all(every, shape, jobs, args.dry)
    if not args.dry:
        measure(args, every, shape)


if __name__ == "__main__":
    main()
