"""Peak memory of a call, in a process of its own. Linux only.

Counted is the growth of the resident set's high-water mark over what it was when the call's inputs
and parameters were in place.
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
    """A short pass through a case, which loads libraries, and the one to measure."""
    return tuple(RUNS[run](case(name, shape, n)) for n in (min(256, length), length))


def peak_bytes(prepare: Callable[..., Passes], *arguments: Any) -> int | None:
    """Peak of the second call that `prepare(*arguments)` returns; None if it does not fit.

    Args:
        prepare: a function of a module, as the new process must import it.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), prepare, arguments).result()


def _peak(threads: int, prepare: Callable[..., Passes], arguments: tuple[Any, ...]) -> int | None:
    torch.set_num_threads(threads)
    _forbid_more_than_there_is()
    warm_up, run = prepare(*arguments)
    warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, not to the next tensors
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use
    before = kibibytes("self/status", "VmHWM")
    try:
        run()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return None
    return (kibibytes("self/status", "VmHWM") - before) * 1024


def kibibytes(file: str, field: str) -> int:
    """A field of a file under /proc.

    Not getrusage's ru_maxrss for the peak: a new process inherits it from its parent.
    """
    return int(Path("/proc", file).read_text().split(f"{field}:")[1].split()[0])


def _forbid_more_than_there_is() -> None:
    """An allocation that this machine can't serve fails, and no other process has to die for it."""
    free = kibibytes("meminfo", "MemAvailable") * 1024 * 9 // 10
    used = kibibytes("self/status", "VmData") * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + free, resource.RLIM_INFINITY))
