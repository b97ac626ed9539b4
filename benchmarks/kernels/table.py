"""Tables about the kernels' machine code, and the lengths of their hot loops: `make kernels`.

    python -m benchmarks.kernels.table [--only sm_90 traffic ...] [--publish]

For each target, what the compiler makes of every launch; and what the kernels load, store and
compute, counted by the interpreter, compared with the least that the operation needs. No GPU is
used, and no time is measured. docs/kernels.md explains the columns.
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
from longctx_layers.command_line import Parser
from longctx_layers.files import write

ROOT = Path(__file__).parents[2]
PARTS = (*TARGETS, "traffic", "baseline")
SIZES = ("ROWS", "KEYS", "TILE", "SPAN", "HEADS", "TOKENS", "CHANNELS")
# What one multiprocessor does in one cycle: bf16 operations of the tensor cores, float32 lanes,
# special functions, issued instructions. From NVIDIA's whitepapers on A100 and H100.
PIPES = {
    "sm_80": {"tensor": 2048, "float32": 64, "special": 16, "issue": 4},
    "sm_90": {"tensor": 4096, "float32": 128, "special": 16, "issue": 4},
}
FLOAT32 = "FFMA|FMUL|FADD|FMNMX|FSEL|FSETP|FSET"

COLUMNS = (
    "call",
    "kernel",
    "tile",
    "regs",
    "spills",
    "shared",
    "products",
    "async",
    "wide",
    "loops",
    "bound",
)
HEAD = """# {title}

Written by `python -m benchmarks.kernels.table` with Triton {triton} and torch {torch}, without a
GPU: nothing here is a speed. [docs/kernels.md](../../docs/kernels.md) explains the columns.

"""
TRAFFIC_TEXT = """\
Counted in the interpreter with the tiles of `default`, before any cache. The bytes that all
programs load and store are compared with reading or writing each tensor once; the operations of
matrix products with those of the visible pairs, or of the recurrence (a write and a read of the
state for each token).

"""


def head(title: str) -> str:
    return HEAD.format(title=title, triton=triton.__version__, torch=torch.__version__)


def bound(kernel: Compiled, target: str) -> str:
    """The pipe that limits the last loop, and the share of the time that tensor cores are busy."""
    if target not in PIPES or not kernel.loops:
        return "-"
    loop = kernel.loops[-1]
    pipes = PIPES[target]
    lanes = 32 * kernel.warps
    cycles = {
        "tensor": matrix_flops(loop, kernel.warps) / pipes["tensor"],
        "float32": count(loop, FLOAT32) * lanes / pipes["float32"],
        "special": count(loop, "MUFU") * lanes / pipes["special"],
        "issue": len(loop) * kernel.warps / pipes["issue"],
    }
    slowest = max(cycles, key=lambda name: cycles[name])
    return f"{slowest}, {cycles['tensor'] / cycles[slowest]:.0%}"


def loops(kernel: Compiled, needed: list[float]) -> str:
    """The length of each hot loop, and the ratio of its matrix products to those it needs."""
    cells = []
    for number, loop in enumerate(kernel.loops):
        done = matrix_flops(loop, kernel.warps)
        is_known = len(needed) == len(kernel.loops) and done >= needed[number]
        times = f"{done / needed[number]:.2f}" if is_known else "-"
        cells.append(f"{len(loop)} ({times})")
    return ", ".join(cells) or "-"


def row(label: str, kernel: Compiled, target: str, needed: list[float]) -> str:
    tile = " ".join(
        f"{name.lower()} {kernel.constants[name]}" for name in SIZES if name in kernel.constants
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


def markdown_head(columns: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def compiled_table(target: str) -> str:
    """The page of a target: a row for each kernel of each launch."""
    lines = markdown_head(COLUMNS)
    for launch in REPRESENTATIVE:
        with compiled_for(target) as kernels:
            launch.run()
        seen = set()
        for kernel in kernels:
            key = (kernel.name, tuple(kernel.instructions))
            if key not in seen:  # a kernel that is launched twice gets one row
                needed = launch.products(kernel.constants).get(kernel.name, [])
                lines.append(row(launch.label, kernel, target, needed))
            seen.add(key)
        print(target, launch.label, flush=True)
    if target == "sm_90":
        lines += [flex_row(head_dim) for head_dim in (64, 128)]
    return head(f"Kernels compiled for {target}") + "\n".join(lines) + "\n"


def flex_row(head_dim: int) -> str:
    """FlexAttention's kernel for the same attention, as torch configures it on an H100."""
    with compiled_for("sm_90") as kernels:
        flex_template.window_attention(head_dim)
    config = flex_template.configuration(head_dim)
    needed = [4.0 * config.block_m * config.block_n * head_dim] * 2
    label = f"FlexAttention, rows {config.block_m} keys {config.block_n}, head_dim {head_dim}"
    return row(label, kernels[0], "sm_90", needed)


def traffic_table() -> str:
    """The page of bytes and operations, counted while the kernels run in the interpreter."""
    lines = markdown_head(("call", "MB", "over the least", "GFLOP", "over the least"))
    for item in TRAFFIC:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            run, least_bytes, least_flops = item.make()
        with interpreted() as traffic:
            run()
        moved = traffic.loaded + traffic.stored
        flops = "- | -"
        if least_flops:
            flops = f"{traffic.flops / 1e9:.3f} | {traffic.flops / least_flops:.2f}"
        lines.append(f"| {item.label} | {moved / 1e6:.2f} | {moved / least_bytes:.2f} | {flops} |")
        print(item.label, flush=True)
    return head("Bytes and operations of the kernels") + TRAFFIC_TEXT + "\n".join(lines) + "\n"


def baseline() -> str:
    """The lengths of the hot loops, with which `test_ahead.py` compares new code, as JSON."""
    lengths: dict[str, dict[str, dict[str, list[int]]]] = {}
    for target in TARGETS:
        for launch in REPRESENTATIVE:
            if launch.fast:
                with compiled_for(target) as kernels:
                    launch.run()
                lengths.setdefault(target, {})[launch.label] = loop_lengths(kernels)
    return json.dumps({"triton": triton.__version__, "loops": lengths}, indent=1) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="write only these; default: all"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/kernels")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write into reports/kernels, and renew the baseline of tests/kernels/test_ahead.py",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = ROOT / "reports/kernels" if args.publish else args.output_dir
    for part in args.only:
        path = folder / f"{part}.md"
        if part == "baseline":
            path = BASELINE if args.publish else folder / "baseline.json"
            write(path, baseline())
        elif part == "traffic":
            write(path, traffic_table())
        else:
            write(path, compiled_table(part))
        print(f"Written to {path}")


if __name__ == "__main__":
    main()
