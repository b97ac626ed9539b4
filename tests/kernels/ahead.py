"""Kernels compiled for GPUs that are not there: the launch is the real one, and nothing runs.

Inside `compiled_for(target)` a launcher that is called with tensors on the meta device compiles
each kernel exactly as it would on that GPU, specialisation included; `Compiled` says what came out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """One kernel on one target.

    Attributes:
        name: of the kernel.
        registers: of a thread.
        spills: instructions or registers that go to local memory.
        shared: bytes of shared memory of a program.
        instructions: names of all machine instructions, in order.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions: list[str]

    def count(self, pattern: str) -> int:
        """Instructions whose name matches."""
        return sum(bool(re.match(pattern, name)) for name in self.instructions)


class _Driver:
    """As much of a GPU's driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _nvidia(name: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            run = [TOOLS / command[0], *command[1:], file.name]
            return subprocess.run(run, capture_output=True, text=True, check=True).stdout

        usage, listing = tool("cuobjdump", "-res-usage"), tool("cuobjdump", "-sass")
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+?)[\s;]", listing)
    spills = sum(line.startswith(("LDL", "STL")) for line in lines)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return Compiled(name, registers, spills, kernel.metadata.shared, lines)


def _amd(name: str, kernel: Any) -> Compiled:
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    lines = re.findall(r"^\s+([a-z]\w+)\s", text, re.MULTILINE)
    # Scalar registers spill to lanes of vector ones, not to memory.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Compiled(name, number("vgpr_count"), spills, kernel.metadata.shared, lines)


@contextmanager
def compiled_for(target: str) -> Iterator[list[Compiled]]:
    """Collect what every launch inside the block compiles to on this one of `TARGETS`."""
    found: list[Compiled] = []
    read = _amd if target.startswith("gfx") else _nvidia

    def launch(kernel: JITFunction, grid: Any) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            kernel.device_caches.clear()
            found.append(read(kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_only

    active = driver._active
    driver.set_active(_Driver(TARGETS[target]))
    try:
        with patch.object(KernelInterface, "__getitem__", launch):
            yield found
    finally:
        driver._active = active
