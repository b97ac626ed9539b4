"""Speed and memory by length: prefill, training, and generation, measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longctx_layers import LongContextLM
from longctx_layers.evals import read
from longctx_layers.lm.model import ModelState
from longctx_layers.reports.checkpoint import Checkpoint
from longctx_layers.reports.content import Part, Picture, Section, Table
from longctx_layers.reports.figures import in_decades, lengths_along, new_panels, png, tidy
from longctx_layers.reports.words import MIB, or_dash, size
from longctx_layers.testing import MemoryMeter

PIECE = 1024  # tokens that are read at once, as in `generate`
NEW_TOKENS = 16
ROUNDS = 3
PICTURE = "speed_and_memory"


@dataclass
class Speed:
    """One checkpoint at one length, a batch of one sequence.

    Attributes:
        reading, training: tokens per second of each round; training is forward and backward.
        writing: seconds per generated token of each round, after `length` tokens.
        reading_bytes, training_bytes: peak memory of tensors in addition to the weights; in
            training, gradients are included. None if it did not fit.
        state_bytes: of one sequence, after `length` tokens.
    """

    length: int
    reading: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)
    reading_bytes: int | None = None
    training_bytes: int | None = None
    state_bytes: int = 0


def measure(checkpoints: Sequence[Checkpoint], lengths: Sequence[int]) -> list[list[Speed]]:
    """By checkpoint and length. They take turns, so that disturbances affect all of them."""
    speeds = [[Speed(n, state_bytes=c.model.state_size(n)) for n in lengths] for c in checkpoints]
    turns = [(c.model, s) for c, row in zip(checkpoints, speeds, strict=True) for s in row]
    with tqdm(total=len(turns) * (ROUNDS + 1), desc="speed", disable=None) as bar:
        for turn in range(ROUNDS + 1):
            for model, speed in turns:
                ids = torch.arange(speed.length + 1, device=model.embedding.weight.device)
                ids = (ids * 7919 % model.config.vocab_size)[None]
                # The round for the memory is also the warm-up.
                (_weigh if turn == 0 else _time)(model, ids, speed)
                bar.update()
    return speeds


@torch.no_grad()
def write(model: LongContextLM, state: ModelState, ids: Tensor) -> None:
    """Continue from a state, token by token."""
    for token in ids[:, :NEW_TOKENS].split(1, 1):
        _, state = model(token, state, return_state=True)


def train(model: LongContextLM, ids: Tensor) -> None:
    """Forward and backward; the gradients are freed."""
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def _read(model: LongContextLM, ids: Tensor) -> ModelState:
    return read(model, ids, tokens_at_once=PIECE)


def _weigh(model: LongContextLM, ids: Tensor, speed: Speed) -> None:
    speed.reading_bytes = peak(lambda: _read(model, ids[:, :-1]), ids.device)
    speed.training_bytes = peak(lambda: train(model, ids), ids.device)


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of the tensors that a call creates, in bytes; None if they do not fit."""
    try:
        if device.type != "cuda":
            with MemoryMeter() as meter:
                call()
            return meter.peak
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    except (torch.OutOfMemoryError, MemoryError):
        return None


def _time(model: LongContextLM, ids: Tensor, speed: Speed) -> None:
    if speed.reading_bytes is not None:
        seconds, state = _seconds(lambda: _read(model, ids[:, :-1]), ids.device)
        speed.reading.append(speed.length / seconds)
        seconds, _ = _seconds(lambda: write(model, state, ids), ids.device)
        speed.writing.append(seconds / min(NEW_TOKENS, ids.shape[1]))
    if speed.training_bytes is not None:
        seconds, _ = _seconds(lambda: train(model, ids), ids.device)
        speed.training.append(speed.length / seconds)


def _seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, result


def section(checkpoints: Sequence[Checkpoint], speeds: Sequence[Sequence[Speed]]) -> Section:
    """A picture and tables."""
    dtypes = ", ".join(sorted({str(c.model.embedding.weight.dtype)[6:] for c in checkpoints}))
    parts: list[Part] = [
        f"One sequence, weights in {dtypes}, medians of {ROUNDS} rounds in which checkpoints and "
        f"lengths take turns. Reading is a prefill in pieces of {PIECE:,} tokens with the state "
        "carried along, training is one forward and one backward pass over the whole length, and "
        f"writing generates {NEW_TOKENS} tokens after it, one by one. Memory is the peak of "
        "tensors in addition to the weights, with the gradients in training; '-' if it did not "
        "fit.",
        Picture(PICTURE, "Speed and memory by length", draw(checkpoints, speeds)),
    ]
    for checkpoint, row in zip(checkpoints, speeds, strict=True):
        header = [
            f"{checkpoint.label}, length (tokens)",
            "reading (tokens/s)",
            "training (tokens/s)",
            "writing (ms/token)",
            "memory, reading",
            "memory, training",
            "state",
        ]
        parts.append(Table(header, [_cells(speed) for speed in row]))
    numbers = {c.label: [vars(s) for s in row] for c, row in zip(checkpoints, speeds, strict=True)}
    return Section("Speed and memory", parts, numbers)


def _cells(speed: Speed) -> list[str]:
    reading, training, writing = (
        statistics.median(values) if values else None
        for values in (speed.reading, speed.training, speed.writing)
    )
    return [
        f"{speed.length:,}",
        or_dash(reading, "{:,.0f}"),
        or_dash(training, "{:,.0f}"),
        or_dash(None if writing is None else 1000 * writing, "{:.2f}"),
        "-" if speed.reading_bytes is None else size(speed.reading_bytes),
        "-" if speed.training_bytes is None else size(speed.training_bytes),
        size(speed.state_bytes),
    ]


def draw(checkpoints: Sequence[Checkpoint], speeds: Sequence[Sequence[Speed]]) -> bytes:
    """Speed on the left, memory in the middle, the state on the right, as a PNG."""
    figure, (fast, much, held) = new_panels(3, (4.4, 4.2))
    tidy(fast, "Speed", "length (tokens)", "tokens per second")
    tidy(much, "Peak memory in addition to the weights", "length (tokens)", "MiB")
    tidy(held, "State of one sequence", "length (tokens)", "MiB")
    for checkpoint, row in zip(checkpoints, speeds, strict=True):
        style: dict[str, Any] = {
            "color": checkpoint.colour,
            "marker": checkpoint.mark,
            "markersize": 6,
        }
        for what, line in (("reading", "-"), ("training", "--")):
            fitting = [s for s in row if getattr(s, f"{what}_bytes") is not None]
            lengths = [s.length for s in fitting]
            medians = [statistics.median(getattr(s, what)) for s in fitting]
            mebibytes = [getattr(s, f"{what}_bytes") / MIB for s in fitting]
            fast.plot(lengths, medians, line, label=f"{checkpoint.label}, {what}", **style)
            much.plot(lengths, mebibytes, line, **style)
        held.plot([s.length for s in row], [s.state_bytes / MIB for s in row], **style)
    for axes in (fast, much, held):
        lengths_along(axes)
        axes.set_xticks([s.length for s in speeds[0]])
        in_decades(axes)
    return png(figure, below=fast.get_legend_handles_labels(), columns=4)
