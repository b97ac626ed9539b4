"""Milliseconds of operations and layers on a GPU, compared with other libraries.

    python -m benchmarks.speed.gpu_table [--lengths 2048 8192] [--groups window ssd] [--publish]

Medians of interleaved rounds in one process, timed by the GPU's own events. The others are torch's
SDPA and FlexAttention, flash-attn, mamba-ssm and fla, where they are installed. Their outputs are
compared with ours before they are timed. For whatever does not run, the table gives the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from benchmarks.speed.common import local_options
from benchmarks.speed.measuring import add_output_dir, command
from longctx_layers import LAYERS, build_layer, ops, use_backend
from longctx_layers.command_line import Parser
from longctx_layers.files import write
from longctx_layers.info import machine

Call = Callable[[], Tensor]
Group = tuple[str, dict[str, Callable[[], Call]]]  # a title, and contenders by name
GROUPS = ("full", "window", "ssd", "layers")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu, to try the program")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument(
        "--tokens", type=int, default=32768, help="smallest number of tokens in a batch"
    )
    parser.add_argument("--n_heads", type=int, default=16)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="window or chunk size")
    parser.add_argument("--states", type=int, default=64, help="state size N of the SSD")
    parser.add_argument("--rounds", type=int, default=20)
    add_output_dir(parser, "gpu")
    return parser.parse_args()


class Inputs:
    """Makes random tensors `[batch, length, ...]` that require gradients."""

    def __init__(self, args: argparse.Namespace, length: int) -> None:
        self.args = args
        self.length = length
        self.batch = max(1, args.tokens // length)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(self.batch, self.length, *shape, device=self.args.device, dtype=dtype)
        return x.requires_grad_()

    def heads(self, count: int) -> Tensor:
        """`[B, H, T, P]`, a view that is contiguous by token, as in the layers."""
        return rearrange(self(count, self.args.head_dim), "b t h p -> b h t p")


def attention(make: Inputs, window: int | None) -> dict[str, Callable[[], Call]]:
    q, k, v = (make.heads(make.args.n_heads) for _ in range(3))

    def ours(backend: str) -> Callable[[], Call]:
        return lambda: lambda: ops.sparse_attention(q, k, v, window_size=window, backend=backend)

    def flash_attn() -> Call:
        from flash_attn import flash_attn_func

        size = (-1, -1) if window is None else (window - 1, 0)
        inputs = [rearrange(x, "b h t p -> b t h p") for x in (q, k, v)]

        def run() -> Tensor:
            y = flash_attn_func(*inputs, causal=True, window_size=size)
            return rearrange(y, "b t h p -> b h t p")

        return run

    def sdpa() -> Call:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {
        **{f"ours, {name}": ours(name) for name in ("triton", "flash", "flex", "torch")},
        "flash-attn": flash_attn,
        ("SDPA" if window is None else "SDPA, full"): sdpa,
    }


def state_space(make: Inputs) -> dict[str, Callable[[], Call]]:
    heads = make.args.n_heads
    x = make(heads, make.args.head_dim)
    B, C = (make(make.args.states) for _ in range(2))
    dt = torch.rand_like(make(heads, dtype=torch.float32)).requires_grad_()
    A = -torch.rand(heads, device=x.device)

    def ours(backend: str) -> Callable[[], Call]:
        return lambda: lambda: ops.ssd(x, dt, A, B, C, backend=backend)[0]

    def mamba_ssm() -> Call:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan

        groups = [rearrange(z, "b t n -> b t 1 n") for z in (B, C)]
        return lambda: scan(x, dt, A, *groups, chunk_size=256)

    def fla() -> Call:
        from fla.ops.simple_gla import chunk_simple_gla

        def run() -> Tensor:
            k, q = (repeat(z, "b t n -> b t h n", h=heads) for z in (B, C))
            u = (x * dt[..., None]).to(x.dtype)
            return chunk_simple_gla(q, k, u, g=dt * A, scale=1.0)[0]

        return run

    return {
        **{f"ours, {name}": ours(name) for name in ("triton", "torch")},
        "mamba-ssm": mamba_ssm,
        "fla, simple_gla": fla,
    }


def layers(make: Inputs) -> dict[str, Callable[[], Call]]:
    args = make.args
    width = args.n_heads * args.head_dim
    x = make(width)

    def contender(name: str, backend: str) -> Callable[[], Call]:
        def build() -> Call:
            options = local_options(name, args.window)
            layer = build_layer(name, width, args.n_heads, device=args.device, **options)
            layer = layer.to(torch.bfloat16)

            def run() -> Tensor:
                with use_backend(backend):
                    y: Tensor = layer(x)[0]
                return y

            return run

        return build

    return {f"{n}, {b}": contender(n, b) for n in LAYERS for b in ("triton", "torch")}


def group(name: str, make: Inputs, args: argparse.Namespace) -> Group:
    """The title and the contenders of one of `GROUPS`."""
    size = f"{make.batch} x {make.length}"
    if name == "full":
        return f"full attention, {size}", attention(make, None)
    if name == "window":
        return f"window attention, {size}", attention(make, args.window)
    if name == "ssd":
        return f"state space (SSD), N {args.states}, {size}", state_space(make)
    return f"layers, {size}", layers(make)


def groups(args: argparse.Namespace) -> Iterator[Group]:
    for length in args.lengths:
        make = Inputs(args, length)
        for name in args.groups:
            yield group(name, make, args)


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond, while the launches queue up
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def with_backward(call: Call) -> Callable[[], None]:
    def run() -> None:
        y = call()
        y.backward(torch.ones_like(y))

    return run


def measure(group: Group, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one group, with times, or with the reason why something could not be timed."""
    title, contenders = group
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    ours = None
    for name, build in contenders.items():
        try:
            call = build()
            y = call().detach()
            with_backward(call)()  # also compiles both passes
            ours = y if ours is None else ours
            difference = (y - ours).abs().max() / ours.abs().max()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {"group": title, "contender": name, "reason": reason}
            continue
        row = {"group": title, "contender": name}
        is_comparable = "layers" not in title and "full" not in name
        if is_comparable and not difference < 0.05:
            yield {
                **row,
                "reason": f"its result differs from ours by {difference:.2g} of the largest value",
            }
            continue
        runs[name] = {"forward": call, "forward+backward": with_backward(call)}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, calls in runs.items():
            for kind, call in calls.items():
                times.setdefault((name, kind), []).append(timed(call, args.device))
    for name in runs:
        medians = {kind: statistics.median(times[name, kind]) for kind in runs[name]}
        yield {"group": title, "contender": name, **medians}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        f"`{command()}`: {machine(args.device)}; bf16, {args.n_heads} heads of "
        f"{args.head_dim}, window or chunk {args.window}. Milliseconds, medians.",
    ]
    title = None
    for row in rows:
        if row["group"] != title:
            title = row["group"]
            lines += ["", f"### {title}", "", "| | forward | forward+backward |", "|---|---|---|"]
        cells = [f"{row[kind]:.3f}" for kind in ("forward", "forward+backward") if kind in row]
        cells = cells or ["-", row["reason"].replace("|", "/")]
        lines.append(f"| {row['contender']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use: nothing was measured")
    rows = []
    for contenders in groups(args):
        for row in measure(contenders, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
        # After each group, so that an interrupted run keeps what it has measured.
        write(args.output_dir / "table.json", json.dumps(rows, indent=1) + "\n")
        write(args.output_dir / "table.md", table(rows, args))
    print(table(rows, args) + f"\nWritten to {args.output_dir}/")


if __name__ == "__main__":
    main()
