"""Is the code of this assembler right? `python gpu/check.py --name bundled`

Attention and the state space at training shapes, in bfloat16, forward and backward, against the
definition in float64: on new inputs each time, and every call twice, because a result that moves is
a race. Then the library's own self check. Prints WRONG lines, and at the end ALL RIGHT or how many
were wrong. `TRITON_PTXAS_PATH` chooses the assembler; use one Triton cache for each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_layers import ops
from longctx_layers.self_check import checks

LARGEST_ERROR = 1.5e-2  # of the norm; bfloat16 itself gives 2e-3 to 5e-3
TURNS = 3

Results = list[Tensor]


class Case(NamedTuple):
    """A call on inputs of its own.

    Attributes:
        title: what is special about it.
        run: outputs and gradients, on the backend under test.
        exact: the same in float64.
        row: results for the first row of the batch, alone; None if its bits may differ.
        by_row: which of the results are rows of a batch, not sums over it.
    """

    title: str
    run: Callable[[], Results]
    exact: Callable[[], Results]
    row: Callable[[], Results] | None = None
    by_row: tuple[int, ...] = ()


class Report:
    """What was found so far, and how much time is left."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.perf_counter()
        self.seconds = seconds
        self.right = 0
        self.wrong = 0

    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.perf_counter() - self.begin)

    def add(self, title: str, problem: str, detail: str = "") -> None:
        """Count and print one finding; an empty problem is none."""
        self.wrong += bool(problem)
        self.right += not problem
        verdict = f"WRONG {title}: {problem}" if problem else f"right {title}"
        print(f"{time.perf_counter() - self.begin:5.1f} s {verdict} {detail}".rstrip(), flush=True)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the norm; NaN stays NaN."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def gradients(
    call: Callable[..., Tensor], inputs: Results, upstream: Tensor, dtype: torch.dtype | None
) -> Results:
    """The output and the gradients of all inputs; in another dtype, if one is named."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def state_space(
    device: str, batch: int, length: int, heads: int, directions: int, packed: bool = False
) -> Case:
    """`ssd` with head_dim 64; packed: segments of 300 tokens."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    x = draw(batch, length, heads, 64).bfloat16()
    dt = draw(batch, length, heads).abs() / 4
    A = -draw(heads).abs() - 0.01
    B, C = (draw(batch, length, directions).bfloat16() / directions**0.5 for _ in range(2))
    dy = torch.randn_like(x)
    start = (torch.arange(length, device=device) // 300 * 300).repeat(batch, 1)
    until = torch.full((batch,), length, device=device)

    def results(backend: str, dtype: torch.dtype | None = None, rows: int = batch) -> Results:
        segments = ops.Segments(start[:rows], until[:rows]) if packed else None

        def call(*inputs: Tensor) -> Tensor:
            y: Tensor = ops.ssd(*inputs, segments=segments, backend=backend)[0]
            return y

        inputs = [x[:rows], dt[:rows], A, B[:rows], C[:rows]]
        return gradients(call, inputs, dy[:rows], dtype)

    backend = "triton" if device == "cuda" else "torch"
    title = f"ssd N {directions}, {batch} x {length}" + (", packed" if packed else "")
    alone = partial(results, backend, rows=1) if batch > 1 and device == "cuda" else None
    exact = partial(results, "torch", torch.float64)
    by_row = (0, 1, 2, 4, 5)  # all but A's gradient
    return Case(title, partial(results, backend), exact, alone, by_row)


def attention(
    device: str,
    batch: int,
    length: int,
    heads: int,
    groups: int,
    head_dim: int,
    window: int | None,
) -> Case:
    """Full or window attention, with `groups` key heads.

    A row alone may differ from the row in a batch: where there are few programs, the keys are split
    among more of them.
    """

    def draw(count: int) -> Tensor:
        shape = batch, length, count, head_dim
        return torch.randn(shape, device=device).bfloat16().transpose(1, 2)

    q, k, v, do = draw(heads), draw(groups), draw(groups), draw(heads)

    def results(backend: str, dtype: torch.dtype | None = None) -> Results:
        def call(*inputs: Tensor) -> Tensor:
            y: Tensor = ops.sparse_attention(*inputs, window_size=window, backend=backend)
            return y

        return gradients(call, [q, k, v], do, dtype)

    reach = "full" if window is None else f"window {window}"
    title = f"attention {reach}, head_dim {head_dim}, {batch} x {length}"
    backend = "triton" if device == "cuda" else "torch"
    return Case(title, partial(results, backend), partial(results, "torch", torch.float64))


def cases(device: str) -> list[Callable[[], Case]]:
    """What is checked in each turn, with new inputs; small on a CPU."""
    gpu = device == "cuda"
    long, ragged, short = (2048, 1999, 1024) if gpu else (128, 331, 96)
    return [
        lambda: state_space(device, 2, long, 4, 64),
        lambda: state_space(device, 2, long, 4, 128),
        lambda: state_space(device, 1, ragged, 3, 64, packed=True),
        lambda: attention(device, 1, short, 4, 4, 64, None),
        lambda: attention(device, 2, long, 4, 2, 64, long // 4),
        lambda: attention(device, 1, long - 48, 4, 1, 128, 30),
    ]


def judge(case: Case) -> tuple[str, str]:
    """What is wrong with a case, if anything, and its largest error."""
    first, second, exact = case.run(), case.run(), case.exact()
    errors = [relative_error(x, z) for x, z in zip(first, exact, strict=True)]
    moved = [n for n, pair in enumerate(zip(first, second, strict=True)) if not torch.equal(*pair)]
    far = [(n, round(e, 5)) for n, e in enumerate(errors) if not e < LARGEST_ERROR]
    problems = []
    if far:
        problems.append(f"far from float64 (result, error): {far}")
    if moved:
        problems.append(f"two equal calls differ in results {moved}")
    if case.row is not None and not moved:
        alone = case.row()
        differing = [n for n in case.by_row if not torch.equal(first[n][:1], alone[n])]
        if differing:
            problems.append(f"a row alone differs from the row in a batch: {differing}")
    return "; ".join(problems), f"(largest error {max(errors):.1e})"


def check_operations(report: Report, device: str) -> None:
    """One turn through all cases, as far as time allows."""
    for make in cases(device):
        if report.left() < 10:
            print("out of time: the remaining cases of this turn did not run")
            return
        title = "a case"
        try:
            case = make()
            title = case.title
            report.add(title, *judge(case))
        except Exception as error:  # whatever a compiler or a driver may raise
            report.add(title, f"{type(error).__name__}: {error}".splitlines()[0][:300])


def check_self(report: Report, device: str, length: int) -> None:
    """The library's own comparison of all operations with their definitions, if time allows."""
    gpu = device == "cuda"
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if gpu else (torch.float32,)
    backends = ("triton",) if gpu else ("cpu", "torch")
    ran = 0
    for check in checks(device, backends=backends, dtypes=dtypes, length=length):
        if report.left() < 5:
            print(f"out of time: the self check of length {length} ended after {ran} calls")
            return
        ran += check.output is not None
        if check.failed:
            report.add("self check", str(check))
    report.add(f"self check, length {length}: {ran} calls ran", "" if ran else "none ran")


def main(argv: list[str] | None = None) -> None:
    """Check until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the assembler, for the log")
    parser.add_argument("--device", default="cuda", help="cpu to try the program")
    parser.add_argument("--seconds", type=float, default=95)
    parser.add_argument("--turns", type=int, default=TURNS, help="with new inputs each")
    args = parser.parse_args(argv)
    print(args.name, os.environ.get("TRITON_PTXAS_PATH", "the assembler in Triton's wheel"))
    report = Report(args.seconds)
    check_operations(report, args.device)
    for length in (200, 1000) if args.device == "cuda" else (20,):
        check_self(report, args.device, length)
    for _ in range(args.turns - 1):
        check_operations(report, args.device)
    print("ALL RIGHT" if report.right and not report.wrong else f"{report.wrong} WRONG", flush=True)


if __name__ == "__main__":
    main()
