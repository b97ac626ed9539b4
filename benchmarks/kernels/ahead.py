"""Compile the kernels for GPUs that this machine does not have, through the real launchers.

Inside `compiled_for(target)`, a launcher called with tensors on the meta device compiles each
kernel exactly as it would on that GPU, specialisation included, and runs nothing. The results are
`Compiled`: registers, spills, shared memory, and the instructions of the whole and of hot loops.
"""

from __future__ import annotations

import math
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
        name: the kernel's name.
        registers: registers per thread.
        spills: instructions that access local memory; on AMD, spilled registers and their bytes.
        shared: bytes of shared memory per program.
        warps: warps per program.
        instructions: the names of all machine instructions, in order.
        loops: the instructions of each innermost loop with matrix products; if no loop has any, but
            the kernel does, all its instructions.
        constants: the kernel's compile-time arguments by name.
    """

    name: str
    registers: int
    spills: int
    shared: int
    warps: int
    instructions: list[str]
    loops: list[list[str]]
    constants: dict[str, Any]

    def count(self, pattern: str) -> int:
        """Instructions whose name matches."""
        return count(self.instructions, pattern)


def number(pattern: str, text: str) -> int:
    """The number that the group of a pattern matches, where the text has it first."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"expected {pattern} in the compiler's output, got {text[:200]!r}")
    return int(match[1])


def count(instructions: list[str], pattern: str) -> int:
    """Instructions whose name matches."""
    return sum(bool(re.match(pattern, name)) for name in instructions)


# Instructions of the tensor cores of sm_80 and sm_89, of sm_90, of sm_100, and of AMD's.
MATRIX_PRODUCTS = r"HMMA|HGMMA|UTC\w*MMA|DMMA|v_mfma"


def _hot_loops(names: list[str], jumps: list[tuple[int, int]]) -> list[list[str]]:
    """The instructions of each innermost loop with matrix products; see `Compiled.loops`.

    Args:
        names: of all instructions.
        jumps: places of jumps, and the places to which they lead. A loop ends with a jump back.
    """
    spans = [(to, at) for at, to in jumps if to <= at]
    inner = [
        (a, b)
        for a, b in spans
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]
    bodies = [names[a : b + 1] for a, b in inner]
    hot = [body for body in bodies if count(body, MATRIX_PRODUCTS)]
    return hot or [names] * (count(names, MATRIX_PRODUCTS) > 0)


def matrix_flops(instructions: list[str], warps: int) -> int:
    """Operations of a program's matrix products; 0 on sm_100, whose instructions hide sizes."""
    total = 0
    for name in instructions:
        if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
            total += 2 * math.prod(map(int, match.groups())) * (warps // 4)  # four warps share one
        elif match := re.match(r"HMMA\.(\d\d)(\d)(\d+)\.|v_mfma_f32_(\d+)x(\d+)x(\d+)", name):
            total += 2 * math.prod(int(n) for n in match.groups() if n) * warps
    return total


def loop_lengths(kernels: list[Compiled]) -> dict[str, list[int]]:
    """The number of instructions of each hot loop, by place and name of the kernel."""
    return {
        f"{place} {kernel.name}": [len(loop) for loop in kernel.loops]
        for place, kernel in enumerate(kernels)
        if kernel.loops
    }


class _Driver:
    """The part of a GPU driver that the compiler asks."""

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


def _nvidia(name: str, kernel: Any, constants: dict[str, Any]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            run = [str(TOOLS / command[0]), *command[1:], file.name]
            return subprocess.run(run, capture_output=True, text=True, check=True).stdout

        usage, listing = tool("cuobjdump", "-res-usage"), tool("cuobjdump", "-sass")
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+?)((?:\s[^;]*)?);")
    lines = line.findall(listing)
    addresses, names, operands = (list(column) for column in zip(*lines, strict=True))
    places = {int(address, 16): n for n, address in enumerate(addresses)}
    jumps = [
        (n, places[int(match[1], 16)])
        for n, (opcode, rest) in enumerate(zip(names, operands, strict=True))
        if opcode.startswith("BRA") and (match := re.search(r"(0x[0-9a-f]+)\s*$", rest))
    ]
    registers = number(r"REG:(\d+)", usage)
    return Compiled(
        name=name,
        registers=registers,
        spills=count(names, "LDL|STL"),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        instructions=names,
        loops=_hot_loops(names, jumps),
        constants=constants,
    )


def _amd(name: str, kernel: Any, constants: dict[str, Any]) -> Compiled:
    text = kernel.asm["amdgcn"]

    def entry(key: str) -> int:
        return number(rf"\.{key}:\s+(\d+)", text)

    names: list[str] = []
    labels: dict[str, int] = {}
    jumps = []
    for line in text.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            labels[match[1]] = len(names)
        elif match := re.match(r"\s+([a-z]\w+)(?:\s+(\S+))?", line):
            names.append(match[1])
            if match[1].startswith(("s_cbranch", "s_branch")) and match[2] in labels:
                jumps.append((len(names) - 1, labels[match[2]]))
    # Scalar registers spill to lanes of vector registers, not to memory: they do not count.
    return Compiled(
        name=name,
        registers=entry("vgpr_count"),
        spills=entry("vgpr_spill_count") + entry("private_segment_fixed_size"),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        instructions=names,
        loops=_hot_loops(names, jumps),
        constants=constants,
    )


@contextmanager
def compiled_for(target: str) -> Iterator[list[Compiled]]:
    """Compile every launch inside the block for one of `TARGETS`; yields the list of results."""
    kernels: list[Compiled] = []
    read = _amd if target.startswith("gfx") else _nvidia

    def launch(kernel: JITFunction, grid: Any) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            kernel.device_caches.clear()
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
            constants = {kernel.arg_names[at[0]]: x for at, x in compiled.src.constants.items()}
            kernels.append(read(kernel.__name__, compiled, constants))

        return compile_only

    active = driver._active
    driver.set_active(_Driver(TARGETS[target]))
    try:
        with patch.object(KernelInterface, "__getitem__", launch):
            yield kernels
    finally:
        driver._active = active
