"""Milliseconds of operations and layers on a GPU, beside what people would otherwise use.

    python -m benchmarks.speed.gpu_table [--lengths 2048 8192] [--groups window ssd] [--publish]

Medians of rounds in which all contenders take turns, in one process, timed by the GPU's own events.
Peers: torch's SDPA and FlexAttention, flash-attn, mamba-ssm and fla, where they are installed; each
output is compared with ours before it is timed. What does not run says why.
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
from torch import Tensor

from benchmarks.speed.common import LOCAL_OPTIONS
from longctx_layers import LAYERS, build_layer, ops, use_backend
from longctx_layers.command_line import add_output
from longctx_layers.files import write
from longctx_layers.info import machine
from longctx_layers.layers import layer_options

Call = Callable[[], Tensor]
Group = tuple[str, dict[str, Callable[[], Call]]]  # a title, and contenders by name
GROUPS = ("full", "window", "ssd", "layers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu only to try the program")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--tokens", type=int, default=32768, help="of a batch, at least")
    parser.add_argument("--n-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--states", type=int, default=64, help="N of the state space")
    parser.add_argument("--rounds", type=int, default=20)
    add_output(parser, "--output", "gpu")
    return parser.parse_args()


class Inputs:
    """Random tensors of the batch, in bf16, with gradients."""

    def __init__(self, args: argparse.Namespace, length: int) -> None:
        self.args, self.length = args, length
        self.batch = max(1, args.tokens // length)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(self.batch, self.length, *shape, device=self.args.device, dtype=dtype)
        return x.requires_grad_()

    def heads(self, count: int) -> Tensor:
        """`[B, H, T, P]`, in memory by token as layers make it."""
        return self(count, self.args.head_dim).transpose(1, 2)


def attention(make: Inputs, window: int | None) -> dict[str, Callable[[], Call]]:
    q, k, v = (make.heads(make.args.n_heads) for _ in range(3))

    def ours(backend: str) -> Callable[[], Call]:
        return lambda: lambda: ops.sparse_attention(q, k, v, window_size=window, backend=backend)

    def flash_attn() -> Call:
        from flash_attn import flash_attn_func

        size = (-1, -1) if window is None else (window - 1, 0)
        inputs = [x.transpose(1, 2) for x in (q, k, v)]
        return lambda: flash_attn_func(*inputs, causal=True, window_size=size).transpose(1, 2)

    def sdpa() -> Call:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = {f"ours, {name}": ours(name) for name in ("triton", "flash", "flex", "torch")}
    return {**found, "flash-attn": flash_attn, ("SDPA" if window is None else "SDPA, full"): sdpa}


def state_space(make: Inputs) -> dict[str, Callable[[], Call]]:
    heads, states = make.args.n_heads, make.args.states
    x, B, C = make(heads, make.args.head_dim), make(states), make(states)
    dt = torch.rand_like(make(heads, dtype=torch.float32)).requires_grad_()
    A = -torch.rand(heads, device=x.device)

    def ours(backend: str) -> Callable[[], Call]:
        return lambda: lambda: ops.ssd(x, dt, A, B, C, backend=backend)[0]

    def mamba_ssm() -> Call:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan

        return lambda: scan(x, dt, A, B[:, :, None], C[:, :, None], chunk_size=256)

    def fla() -> Call:
        from fla.ops.simple_gla import chunk_simple_gla

        def run() -> Tensor:
            k, q = (z[:, :, None].expand(-1, -1, heads, -1) for z in (B, C))
            u = (x * dt[..., None]).to(x.dtype)
            return chunk_simple_gla(q, k, u, g=dt * A, scale=1.0)[0]

        return run

    found = {f"ours, {name}": ours(name) for name in ("triton", "torch")}
    return {**found, "mamba-ssm": mamba_ssm, "fla, simple_gla": fla}


def layers(make: Inputs) -> dict[str, Callable[[], Call]]:
    args = make.args
    width = args.n_heads * args.head_dim
    x = make(width)

    def contender(name: str, backend: str) -> Callable[[], Call]:
        def build() -> Call:
            options = {n: args.window for n in LOCAL_OPTIONS if n in layer_options(name)}
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
    """One of GROUPS."""
    of = f"{make.batch} x {make.length}"
    if name == "full":
        return f"full attention, {of}", attention(make, None)
    if name == "window":
        return f"window attention, {of}", attention(make, args.window)
    if name == "ssd":
        return f"state space (SSD), N {args.states}, {of}", state_space(make)
    return f"layers, {of}", layers(make)


def groups(args: argparse.Namespace) -> Iterator[Group]:
    for length in args.lengths:
        make = Inputs(args, length)
        for name in args.groups:
            yield group(name, make, args)


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds."""
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches queue up
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def with_backward(call: Call) -> Callable[[], None]:
    def run() -> None:
        y = call()
        y.backward(torch.ones_like(y))

    return run


def measure(group: Group, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one group; a contender that can't run has a reason instead of times."""
    title, contenders = group
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    ours = None
    for name, build in contenders.items():
        try:
            call = build()
            y = call().detach()
            with_backward(call)()  # compiles what must be
            ours = y if ours is None else ours
            error = (y - ours).abs().max() / ours.abs().max()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {"group": title, "contender": name, "reason": reason}
            continue
        row = {"group": title, "contender": name}
        same = "layers" not in title and "full" not in name
        if same and not error < 0.05:
            yield {**row, "reason": f"its result differs from ours by {error:.2g} of the largest"}
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
        f"`python {' '.join(sys.argv)}`: {machine(args.device)}; bf16, {args.n_heads} heads of "
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
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for contenders in groups(args):
        for row in measure(contenders, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
        # After each group: whatever ends the program later, these were measured.
        write(args.output / "table.json", json.dumps(rows, indent=1) + "\n")
        write(args.output / "table.md", table(rows, args))
    print(table(rows, args) + f"\nWritten to {args.output}/")


if __name__ == "__main__":
    main()
