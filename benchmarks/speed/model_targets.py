"""Targets of whole models: decoding after a long context, and a step of training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.common import state_bytes
from benchmarks.speed.measuring import Row, interleave, ratio
from benchmarks.speed.memory import Passes, peak_bytes
from longctx_layers import LongContextLM, create_model

SHORT, LONG = 1_000, 1_000_000


def model(args: argparse.Namespace, block: str) -> LongContextLM:
    """A model of the size that the options ask for."""
    torch.manual_seed(0)
    options = {} if block == "vanilla" else {"window_size": args.local}
    return create_model(args.vocab_size, args.size, block, options)


def weights_once(lm: LongContextLM) -> Callable[[], None]:
    """Every weight matrix of a model times one vector: a token cannot read less than that."""
    linears = [m for m in lm.modules() if isinstance(m, nn.Linear)]
    inputs = {n: torch.randn(1, 1, n) for n in {m.in_features for m in linears}}
    hidden = torch.randn(1, 1, lm.config.d_model)

    @torch.no_grad()
    def run() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])
        if lm.head is None:
            lm.project(hidden)

    return run


@torch.no_grad()
def prefill(lm: LongContextLM, length: int, piece: int = 4096) -> Any:
    """The state after `length` random tokens."""
    state = None
    for ids in torch.randint(lm.config.vocab_size, (1, length)).split(piece, dim=1):
        _, state = lm(ids, state, return_state=True, last_only=True)
    return state


def decoding(lm: LongContextLM, state: Any) -> Callable[[], None]:
    """A step of one token; each call continues after the token of the call before."""
    ids: Tensor = torch.zeros(1, 1, dtype=torch.int64)

    @torch.no_grad()
    def run() -> None:
        nonlocal ids, state
        logits, state = lm(ids, state, return_state=True, last_only=True)
        ids = logits[:, -1:].argmax(-1)

    return run


def decode(args: argparse.Namespace) -> Iterator[Row]:
    """One token of DPASSM after a short and a long context, over reading its weights once.

    Since the shapes of the state do not depend on the length, the state of the long context is that
    of 4,096 tokens with another position; examples/stream.py processes a long context in full.
    """
    lm = model(args, "dpassm").eval()
    short = prefill(lm, SHORT)
    long = prefill(lm, 4096)
    long = tuple(layer._replace(position=layer.position * 0 + LONG) for layer in long)
    calls = {"short": decoding(lm, short), "long": decoding(lm, long), "floor": weights_once(lm)}
    times = interleave(calls, rounds=20 * args.rounds, seconds=args.seconds)
    what = f"time of a token after {LONG:,} / after {SHORT:,}"
    yield ratio(what, times["long"], times["short"], at_most=1.05)
    for name, context in (("short", SHORT), ("long", LONG)):
        what = f"a token after {context:,} / all weights once"
        yield ratio(what, times[name], times["floor"], at_most=1.3)
        yield Row(f"tokens per second after {context:,}", 1 / times[name].median, "tokens/s")
    short_bytes = state_bytes(short)
    long_bytes = state_bytes(long)
    what = f"state after {LONG:,} / after {SHORT:,}"
    detail = f"{long_bytes:,} / {short_bytes:,} bytes"
    yield Row(what, long_bytes / short_bytes, at_most=1.0, detail=detail)


def training_step(args: argparse.Namespace, block: str) -> Callable[[int], None]:
    """A step of AdamW on one sequence: chunked loss, gradient checkpointing."""
    lm = model(args, block)
    lm.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4)

    def run(length: int) -> None:
        ids = torch.randint(args.vocab_size, (1, length + 1))
        optimizer.zero_grad()
        lm.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()

    return run


def training_passes(args: argparse.Namespace, block: str) -> Passes:
    """A short step that allocates gradients and optimizer state, and the step to measure."""
    step = training_step(args, block)
    return lambda: step(64), lambda: step(args.length)


def training(args: argparse.Namespace) -> Iterator[Row]:
    """A step of training: tokens per second and memory, compared with vanilla."""
    steps = {block: training_step(args, block) for block in ("dpassm", "vanilla")}
    calls = {block: lambda step=step: step(args.length) for block, step in steps.items()}
    times = interleave(calls, rounds=args.rounds, seconds=args.seconds)
    del steps, calls
    for block, timing in times.items():
        speed = args.length / timing.median
        yield Row(
            f"{block}, training at {args.length:,}",
            speed,
            "tokens/s",
            detail=f"{timing.median:.4g} s a step",
        )
        peak = None if args.no_memory else peak_bytes(training_passes, args, block)
        if peak is not None:
            detail = "over weights, gradients and AdamW's state"
            yield Row(f"{block}, peak of a step", peak / 2**20, "MiB", detail=detail)
