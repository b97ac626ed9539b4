"""A page about the kernels and the lengths of their hot loops: `make kernels`.

What the compiler makes of every launch on every target, and what the kernels move and compute as
counted by the interpreter, beside the least that the operation needs. No GPU is used or measured.
Writes `runs/kernels/`; with `--publish` docs/kernels.md, and the baseline of `test_ahead.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton

from benchmarks.kernels import flex_template
from benchmarks.kernels.ahead import (
    MATRIX_PRODUCTS,
    TARGETS,
    Compiled,
    compiled_for,
    count,
    loop_lengths,
    matrix_flops,
)
from benchmarks.kernels.interpreter import interpreted
from benchmarks.kernels.launches import BASELINE, REPRESENTATIVE, TRAFFIC

ROOT = Path(__file__).parents[2]
SHOWN = ("ROWS", "KEYS", "TILE", "SPAN", "HEADS", "TOKENS", "CHANNELS")
# Of one multiprocessor in one cycle: bf16 operations of the tensor cores, float32 lanes, special
# functions, instructions of warps issued. From NVIDIA's whitepapers of A100 and H100.
PIPES = {
    "sm_80": {"tensor": 2048, "float32": 64, "special": 16, "issue": 4},
    "sm_90": {"tensor": 4096, "float32": 128, "special": 16, "issue": 4},
}
FLOAT32 = "FFMA|FMUL|FADD|FMNMX|FSEL|FSETP|FSET"

HEAD = """# What the compiler makes of the kernels

Written by `python -m benchmarks.kernels.table` with Triton {version} and torch {torch}, without
a GPU: nothing here is a speed. Launches are the library's own (`benchmarks/kernels/launches.py`:
batch 2, 4096 tokens, 12 heads, bf16 unless said); {targets}.
sm_89 stands for GPUs without a row of their own.

- *tile*: what a program takes at a time, its warps; *regs*: registers of a thread; *spills*:
  instructions that go to local memory; *shared*: KiB of shared memory of a program.
- *products*: tensor-core instructions; *async*: asynchronous copies to shared memory; *wide*:
  loads of 16 bytes at once.
- *loops*: instructions of each inner loop that multiplies matrices, or of all if none does, in
  brackets how many times more such work it does than the tile needs (- where instructions hide
  their sizes). In a state space's, the exact product of a float32 and a bf16 needs three.
- *bound*: the pipe that limits the last loop if all overlap perfectly, and the share of that time
  in which the tensor cores are busy (sm_80 and sm_90).
"""


def bound(kernel: Compiled, target: str) -> str:
    """The busiest pipe of the last loop."""
    if target not in PIPES or not kernel.loops:
        return "-"
    loop, pipes, lanes = kernel.loops[-1], PIPES[target], 32 * kernel.warps
    cycles = {
        "tensor": matrix_flops(loop, kernel.warps) / pipes["tensor"],
        "float32": count(loop, FLOAT32) * lanes / pipes["float32"],
        "special": count(loop, "MUFU") * lanes / pipes["special"],
        "issue": len(loop) * kernel.warps / pipes["issue"],
    }
    slowest = max(cycles, key=lambda name: cycles[name])
    return f"{slowest}, {cycles['tensor'] / cycles[slowest]:.0%}"


def loops(kernel: Compiled, needed: list[float]) -> str:
    cells = []
    for number, loop in enumerate(kernel.loops):
        done = matrix_flops(loop, kernel.warps)
        seen = len(needed) == len(kernel.loops) and done >= needed[number]
        times = f"{done / needed[number]:.2f}" if seen else "-"
        cells.append(f"{len(loop)} ({times})")
    return ", ".join(cells) or "-"


def row(label: str, kernel: Compiled, target: str, needed: list[float]) -> str:
    tile = " ".join(
        f"{name.lower()} {kernel.constants[name]}" for name in SHOWN if name in kernel.constants
    )
    cells = [
        label,
        kernel.name.lstrip("_"),
        f"{tile}, {kernel.warps} warps",
        kernel.registers,
        kernel.spills,
        f"{kernel.shared / 1024:.0f}",
        kernel.count(MATRIX_PRODUCTS),
        kernel.count("LDGSTS|UTMALDG"),
        kernel.count(r"LDG\.E\S*\.128|LDGSTS\S*\.128|global_load_dwordx4|buffer_load_dwordx4"),
        loops(kernel, needed),
        bound(kernel, target),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


COLUMNS = (
    "call", "kernel", "tile", "regs", "spills", "shared", "products", "async", "wide", "loops",
    "bound",
)  # fmt: skip


def compiled_tables() -> str:
    lines = []
    for target in TARGETS:
        lines += ["", f"## {target}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for launch in REPRESENTATIVE:
            with compiled_for(target) as found:
                launch.run()
            seen = set()
            for kernel in found:
                key = kernel.name, tuple(kernel.instructions)
                if key not in seen:  # a kernel that is launched twice stands here once
                    needed = launch.products(kernel.constants).get(kernel.name, [])
                    lines.append(row(launch.label, kernel, target, needed))
                seen.add(key)
            print(target, launch.label, flush=True)
        if target == "sm_90":
            lines += [flex_row(head_dim) for head_dim in (64, 128)]
    return "\n".join(lines) + "\n"


def flex_row(head_dim: int) -> str:
    """FlexAttention's kernel for the same attention, as torch configures it on an H100."""
    with compiled_for("sm_90") as found:
        flex_template.window_attention(head_dim)
    config = flex_template.configuration(head_dim)
    needed = [4.0 * config.block_m * config.block_n * head_dim] * 2
    label = f"FlexAttention's, rows {config.block_m} keys {config.block_n}, head_dim {head_dim}"
    return row(label, found[0], "sm_90", needed)


def traffic_table() -> str:
    """Bytes and operations, counted while the kernels run interpreted, over the least possible."""
    lines = [
        "",
        "## Bytes and operations",
        "",
        "Counted in the interpreter with the tiles of `default`, before any cache: every program's",
        "loads and stores over each tensor once; matrix products over those of visible pairs, or",
        "of the recurrence (a write and a read of the state for each token).",
        "",
        "| call | MB | over the least | GFLOP | over the least |",
        "|---|---|---|---|---|",
    ]
    for item in TRAFFIC:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            run, least_bytes, least_flops = item.make()
        with interpreted() as traffic:
            run()
        moved = traffic.loaded + traffic.stored
        flops = (
            f"{traffic.flops / 1e9:.3f} | {traffic.flops / least_flops:.2f}"
            if least_flops
            else "- | -"
        )
        lines.append(f"| {item.label} | {moved / 1e6:.2f} | {moved / least_bytes:.2f} | {flops} |")
        print(item.label, flush=True)
    return "\n".join(lines) + "\n"


def baseline() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Instructions of the hot loops: the numbers that `test_ahead.py` holds new code against."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for target in TARGETS:
        for launch in REPRESENTATIVE:
            if launch.fast:
                with compiled_for(target) as kernels:
                    launch.run()
                found.setdefault(target, {})[launch.label] = loop_lengths(kernels)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="renew the committed files")
    args = parser.parse_args(argv)
    folder = ROOT / "runs/kernels"
    args.page, args.baseline = folder / "kernels.md", folder / "baseline.json"
    if args.publish:
        args.page, args.baseline = ROOT / "docs/kernels.md", BASELINE
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = {"triton": triton.__version__, "loops": baseline()}
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.baseline.write_text(json.dumps(found, indent=1) + "\n")
    text = HEAD.format(
        version=triton.__version__, torch=torch.__version__, targets=", ".join(TARGETS)
    )
    text += compiled_tables() + traffic_table()
    args.page.write_text(text)
    print(f"Written to {args.page} and {args.baseline}")


if __name__ == "__main__":
    main()
