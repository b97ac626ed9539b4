"""Peak memory of a call, in a process of its own. Linux only.

The number is how far the peak of the resident set during the call exceeds its size just before
the call, when inputs and parameters are already in memory.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.common import RUNS, Shape
from benchmarks.speed.contenders import case

Passes = tuple[Callable[[], Any], Callable[[], Any]]


def passes(name: str, run: str, length: int, shape: Shape) -> Passes:
    """A short pass that loads libraries, and the pass to measure."""
    make_run = RUNS[run]
    warm_up = make_run(case(name, shape, min(256, length)))
    return warm_up, make_run(case(name, shape, length))


def peak_bytes(prepare: Callable[..., Passes], *arguments: Any) -> int | None:
    """Peak memory of the second call that `prepare(*arguments)` returns; None if it does not fit.

    Args:
        prepare: a function at the top level of a module, since another process imports it.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), prepare, arguments).result()


def _peak(threads: int, prepare: Callable[..., Passes], arguments: tuple[Any, ...]) -> int | None:
    torch.set_num_threads(threads)
    _limit_to_free_memory()
    warm_up, run = prepare(*arguments)
    warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, so that new tensors count
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
    before = kibibytes("self/status", "VmHWM")
    try:
        run()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return None
    return (kibibytes("self/status", "VmHWM") - before) * 1024


def kibibytes(file: str, field: str) -> int:
    """A field of a file under /proc, in KiB.

    The peak comes from there, since a new process inherits getrusage's `ru_maxrss` from its parent.
    """
    return int(Path("/proc", file).read_text().split(f"{field}:")[1].split()[0])


def _limit_to_free_memory() -> None:
    """Let an allocation beyond the free memory fail, before the system kills some process."""
    free = kibibytes("meminfo", "MemAvailable") * 1024 * 9 // 10
    used = kibibytes("self/status", "VmData") * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + free, resource.RLIM_INFINITY))
